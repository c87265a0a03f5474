"""The Megatron engine gives the run of the DeepSpeed engine, with every router on any layout."""

from __future__ import annotations

import pytest
from engines.layout_table import Layout, Table, same_runs

TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
EP2 = "--expert-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
FOUR_LAYERS = "--num-layers 4"  # two stages of two chunks
PLAIN = {
    "1 rank": Layout(1),
    "DP2": Layout(2),
    "EP2": Layout(2, EP2),
    "TP2": Layout(2, TP2),
    "TP2, expert-TP 1": Layout(2, f"{TP2} --expert-tensor-parallel-size 1"),
    "PP2": Layout(2, PP2),
    "PP2 x VPP2": Layout(2, f"{PP2} --virtual-pipeline-model-parallel-size 2", FOUR_LAYERS),
    "CP2": Layout(2, "--context-parallel-size 2"),
    "TP2 x EP2, expert-TP 2": Layout(4, f"{TP2} {EP2}"),
    "TP2 x EP2, expert-TP 1": Layout(4, f"{TP2} {EP2} --expert-tensor-parallel-size 1"),
    "TP2 x PP2": Layout(4, f"{TP2} {PP2}"),
    "PP2 x EP2": Layout(4, f"{PP2} {EP2}"),
}
SPLIT = "--use-distributed-optimizer"  # communication overlaps wherever there are two data-parallel ranks
BUCKETS = "--ddp-bucket-size 500"  # nearly one for each parameter, instead of one for all
ON_MEGATRON = {
    **PLAIN,
    **{
        f"{name}, distributed optimizer": layout._replace(flags=f"{layout.flags} {SPLIT}")
        for name, layout in PLAIN.items()
    },
    "DP2, nothing overlaps": Layout(2, f"{SPLIT} --no-overlap-grad-reduce"),
    "DP2, gradients overlap": Layout(2, f"--overlap-grad-reduce {BUCKETS}"),
    "DP2, untied, buckets": Layout(2, f"{SPLIT} {BUCKETS}", "--untie-embeddings-and-output-weights"),
    "DP2 x EP2, buckets": Layout(4, f"{EP2} {SPLIT} {BUCKETS}"),
    "DP2 x PP2 x VPP2, buckets": Layout(
        4, f"{PP2} --virtual-pipeline-model-parallel-size 2 {SPLIT} {BUCKETS}", FOUR_LAYERS
    ),
    "EP2, allgather, recompute": Layout(
        2, f"{EP2} --moe-token-dispatcher-type allgather --recompute-granularity full"
    ),
    "CP2, recompute": Layout(2, "--context-parallel-size 2 --recompute-granularity selective"),
    "no clipping": Layout(1, "", "--clip-grad 0"),
}
LAYOUTS = {
    name: layout._replace(flags=f"--engine megatron {layout.flags}") for name, layout in ON_MEGATRON.items()
}

# One process of the other engine is the reference, which is compared with a plain float64 model elsewhere.
table, test_layout_gives_the_run_of_one_process = same_runs(LAYOUTS)


def test_the_norm_is_told_without_clipping(table: Table) -> None:
    free, clipped = (
        table.runs["hyper", "no clipping"].told["steps"],
        table.runs["hyper", "1 rank"].told["steps"],
    )
    assert free[0]["grad_norm"] == pytest.approx(clipped[0]["grad_norm"], rel=1e-5)
    assert free[1]["lm_loss"] != clipped[1]["lm_loss"]
