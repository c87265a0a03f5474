"""TP2 x PP2 x EP2 on eight processes, both engines: the run of one process.  Not in the default tests: ``pytest -m eight_ranks``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engines.layout_table import THREE, Layout, Table, assert_same_run, run_table
from program.launched import Zygote

pytestmark = pytest.mark.eight_ranks
CUBE = "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 --expert-model-parallel-size 2"
ETP1 = "--expert-tensor-parallel-size 1"
LAYOUTS = {
    "DeepSpeed, expert-TP 2": Layout(8, CUBE),
    "DeepSpeed, expert-TP 1": Layout(8, f"{CUBE} {ETP1}"),
    "Megatron, expert-TP 2": Layout(8, f"--engine megatron {CUBE}"),
    "Megatron, expert-TP 1": Layout(8, f"--engine megatron {CUBE} {ETP1}"),
    "Megatron, expert-TP 2, distributed optimizer": Layout(8, f"--engine megatron {CUBE} --use-distributed-optimizer"),
    "Megatron, expert-TP 1, distributed optimizer": Layout(8, f"--engine megatron {CUBE} {ETP1} --use-distributed-optimizer"),
}


@pytest.fixture(scope="module")
def table(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Every router in every layout."""
    return run_table(zygote, LAYOUTS, THREE, tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("router", THREE)
def test_layout_gives_the_run_of_one_process(
    table: Table, router: str, layout: str, record_property: Callable[[str, object], None]
) -> None:
    assert_same_run(table, router, layout, record_property)
