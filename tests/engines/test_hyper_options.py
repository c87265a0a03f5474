"""The options of HyperRouter that give it more to learn with: each engine and layout gives the run of one
process.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engines.layout_table import Layout, Table, assert_same_run, run_table
from program.launched import Zygote

from megatron_hyperrouter.checkpoint.weights import read_tensors

S, E = 7, 4
ROUTERS = {
    "an embedding for each expert": f"hyper --router.per-expert-embedding --router.embedding-size {S}",
    "larger and faster": "hyper --router.embedding-size 80 --router.hypernet-width 300 --router.lr-mult 10",
}
LAYOUTS = {
    "deepspeed, EP2, ZeRO-1": Layout(2, "--expert-model-parallel-size 2 --zero-stage 1 --shard-hypernetwork"),
    "megatron": Layout(1, "--engine megatron"),
    "megatron, TP2": Layout(2, "--engine megatron --tensor-model-parallel-size 2 --sequence-parallel"),
}


@pytest.fixture(scope="module")
def table(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return run_table(zygote, LAYOUTS, ROUTERS.values(), tmp_path_factory.mktemp("options"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("router", ROUTERS)
def test_layout_gives_the_run_of_one_process(
    table: Table, router: str, layout: str, record_property: Callable[[str, object], None]
) -> None:
    assert_same_run(table, ROUTERS[router], layout, record_property)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_holds_the_embeddings(table: Table, layout: str) -> None:
    name = "decoder.layers.1.mlp.router.embedding_S"
    saved = read_tensors(table.runs[ROUTERS["an embedding for each expert"], layout].weights, [name])
    assert saved[name].shape == (E * S,)
