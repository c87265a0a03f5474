"""The Megatron engine gives the run of the DeepSpeed engine, on any layout."""

from __future__ import annotations

import pytest
from engines.layout_table import Layout, Run, assert_same_run, run_table

TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
FOUR_LAYERS = "--num-layers 4"  # two stages of two chunks
ALL_ROUTERS = {
    "1 rank": Layout(1, ""),
    "EP2, alltoall": Layout(2, "--expert-model-parallel-size 2"),
    "TP2": Layout(2, TP2),
}
HYPER = {
    "1 rank, distributed optimizer": Layout(1, "--use-distributed-optimizer"),
    "DP2, distributed optimizer": Layout(2, "--use-distributed-optimizer"),
    "DP2, overlap": Layout(2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    "EP2, allgather, recompute": Layout(
        2, "--expert-model-parallel-size 2 --moe-token-dispatcher-type allgather --recompute-granularity full"
    ),
    "TP2, expert-TP 1": Layout(2, f"{TP2} --expert-tensor-parallel-size 1"),
    "PP2": Layout(2, "--pipeline-model-parallel-size 2"),
    "PP2 x VPP2": Layout(2, "--pipeline-model-parallel-size 2 --virtual-pipeline-model-parallel-size 2"),
    "CP2": Layout(2, "--context-parallel-size 2 --recompute-granularity selective"),
    "TP2 x EP2, expert-TP 2": Layout(4, f"{TP2} --expert-model-parallel-size 2"),
    "TP2 x EP2, expert-TP 1": Layout(4, f"{TP2} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"),
    "TP2 x PP2": Layout(4, f"{TP2} --pipeline-model-parallel-size 2"),
    "PP2 x EP2": Layout(4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"),
}
THREE = ("topk", "smoe_dropout", "hyper")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Run]:
    """The reference is one process of the other engine, which is compared with a plain float64 model elsewhere."""
    rows = [(router, "reference", Layout(1, "")) for router in THREE]
    rows += [(router, name, on_megatron(layout)) for router in THREE for name, layout in ALL_ROUTERS.items()]
    rows += [("hyper", name, on_megatron(layout)) for name, layout in HYPER.items()]
    rows += [
        ("hyper", "deepspeed, no clipping", Layout(1, "--clip-grad 0")),
        ("hyper", "no clipping", on_megatron(Layout(1, "--clip-grad 0"))),
    ]
    return run_table(rows, tmp_path_factory.mktemp("layouts"), more=FOUR_LAYERS)


def on_megatron(layout: Layout) -> Layout:
    return Layout(layout.ranks, f"--engine megatron {layout.flags}")


@pytest.mark.parametrize("layout", ALL_ROUTERS)
@pytest.mark.parametrize("router", THREE)
def test_every_router(runs: dict[tuple[str, str], Run], router: str, layout: str) -> None:
    assert_same_run(runs[router, layout], runs[router, "reference"])


@pytest.mark.parametrize("layout", HYPER)
def test_hyperrouter_on_any_layout(runs: dict[tuple[str, str], Run], layout: str) -> None:
    assert_same_run(runs["hyper", layout], runs["hyper", "reference"])


def test_the_norm_is_told_without_clipping(runs: dict[tuple[str, str], Run]) -> None:
    assert_same_run(runs["hyper", "no clipping"], runs["hyper", "deepspeed, no clipping"])
    clipped = runs["hyper", "reference"].told["steps"]
    assert runs["hyper", "no clipping"].told["steps"][0]["grad_norm"] == pytest.approx(clipped[0]["grad_norm"], rel=1e-5)
    assert runs["hyper", "no clipping"].told["steps"][1]["lm_loss"] != clipped[1]["lm_loss"]
