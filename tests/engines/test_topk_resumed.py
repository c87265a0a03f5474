"""k changes right after a resume and later: routers, dispatch and statistics of both engines use the k of the
step.
"""

from __future__ import annotations

from typing import Any

import pytest
from distributed import run_ranks
from engines.layout_table import WORKER
from engines.layout_worker import tiny_config
from program.launched import Zygote

EP2 = "--expert-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
LAYOUTS = {
    "deepspeed, EP2": EP2,
    "deepspeed, PP2": PP2,
    "megatron, EP2, alltoall": f"--engine megatron {EP2}",
    "megatron, EP2, allgather": f"--engine megatron {EP2} --moe-token-dispatcher-type allgather",
    "megatron, PP2, distributed optimizer": f"--engine megatron {PP2} --use-distributed-optimizer",
}
LAYOUTS = {name: f"{flags} --no-moe-grouped-gemm" for name, flags in LAYOUTS.items()} | {
    f"{name}, grouped": LAYOUTS[name] for name in ("deepspeed, EP2", "megatron, EP2, alltoall")
}
SCHEDULE = (
    "--router.name hyper --moe-router-topk 4 --topk-start 1 --topk-schedule multistep --topk-schedule-steps 6"
).split()
TOPK = (1, 1, 2, 2, 4, 4)
SAVED = 2  # the next step is the first with k = 2
Told = list[dict[str, Any]]


@pytest.fixture(scope="module")
def runs(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Told, Told]]:
    """Steps of a run that is saved in its middle, and of another that goes on from there with an engine of
    its own.
    """
    root = tmp_path_factory.mktemp("topk")
    cases: list[dict[str, Any]] = []
    for number, flags in enumerate(LAYOUTS.values()):
        case = {"flags": [*SCHEDULE, *flags.split()], "watch": True}
        folder = str(root / str(number))
        cases.append(case | {"steps": len(TOPK), "save_at": SAVED, "folder": folder})
        cases.append(case | {"steps": len(TOPK) - SAVED, "first": SAVED, "load": folder})
    told = [
        answer["steps"]
        for answer in run_ranks(zygote, WORKER, {"cases": cases}, ranks=2, folder=root / "ranks", timeout=600)
    ]
    return dict(zip(LAYOUTS, zip(told[::2], told[1::2], strict=True), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_step_has_its_k(runs: dict[str, tuple[Told, Told]], layout: str) -> None:
    for told, expected in zip(runs[layout], (TOPK, TOPK[SAVED:]), strict=True):
        assert [step["watched"]["topk"] for step in told] == [[topk] for topk in expected]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_route_arrives_at_an_expert(runs: dict[str, tuple[Told, Told]], layout: str) -> None:
    config = tiny_config([])
    routes = config.train.global_batch_size * config.model.seq_length * config.model.num_layers
    for told, expected in zip(runs[layout], (TOPK, TOPK[SAVED:]), strict=True):
        assert [step["watched"]["arrived"] for step in told] == [routes * topk for topk in expected]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_are_those_of_the_choices(runs: dict[str, tuple[Told, Told]], layout: str) -> None:
    for told in runs[layout]:
        for step in told:
            assert step["load"] == pytest.approx(step["watched"]["load"], rel=1e-6)
    loads = [step["load"] for step in runs[layout][0]]
    assert max(loads[0]) > max(loads[2]) > max(loads[4]) == pytest.approx(1.0)  # all of 4 experts: even


@pytest.mark.parametrize("layout", ["deepspeed, EP2", "deepspeed, PP2"])
def test_slots_hold_the_largest_load_and_no_more(runs: dict[str, tuple[Told, Told]], layout: str) -> None:
    for told in runs[layout]:
        for step in told:
            seen = step["watched"]
            together = "EP2" in layout  # ranks that exchange tokens need as many slots as one another
            wanted = (
                [[max(pair) for pair in zip(*seen["largest"], strict=True)]] * 2
                if together
                else seen["largest"]
            )
            assert seen["slots"] == wanted and seen["slots"][0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_steps_are_those_of_the_whole_run(runs: dict[str, tuple[Told, Told]], layout: str) -> None:
    whole, resumed = runs[layout]
    assert resumed == whole[SAVED:]
    assert len({step["lm_loss"] for step in whole}) == len(TOPK)
