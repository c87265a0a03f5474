"""TP2 x PP2 x EP2 on eight processes, both engines: the run of one process.  Not in the default tests:
``pytest -m eight_ranks``.
"""

from __future__ import annotations

import pytest
from engines.layout_table import Layout, same_runs

pytestmark = pytest.mark.eight_ranks
CUBE = (
    "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
    "--expert-model-parallel-size 2"
)
ETP1 = "--expert-tensor-parallel-size 1"
LAYOUTS = {
    "DeepSpeed, expert-TP 2": Layout(8, CUBE),
    "DeepSpeed, expert-TP 1": Layout(8, f"{CUBE} {ETP1}"),
    "Megatron, expert-TP 2": Layout(8, f"--engine megatron {CUBE}"),
    "Megatron, expert-TP 1": Layout(8, f"--engine megatron {CUBE} {ETP1}"),
    "Megatron, expert-TP 2, distributed optimizer": Layout(
        8, f"--engine megatron {CUBE} --use-distributed-optimizer"
    ),
    "Megatron, expert-TP 1, distributed optimizer": Layout(
        8, f"--engine megatron {CUBE} {ETP1} --use-distributed-optimizer"
    ),
}

table, test_layout_gives_the_run_of_one_process = same_runs(LAYOUTS)
