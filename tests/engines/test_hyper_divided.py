"""A hypernetwork that the data-parallel ranks divide: each layout gives the run of one process, which has
all of it, and leaves the same checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engines.layout_table import Layout, Table, assert_same_run, run_table
from engines.layout_worker import tiny_config
from program.launched import Zygote

from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names
from megatron_hyperrouter.config.derived import hypernetwork_parts
from megatron_hyperrouter.errors import ConfigError

# One hypernetwork for all layers, and one for each; 8 samples are two micro-batches of a rank.
ROUTERS = {
    "one for all layers": "hyper --router.shared model",
    "a bias": "hyper --router.bias --router.anchor",
}
LAYOUTS = {
    "deepspeed, ZeRO-2": Layout(2, "--zero-stage 2 --shard-hypernetwork"),
    "deepspeed, ZeRO-0": Layout(2, "--zero-stage 0 --shard-hypernetwork"),
    "megatron, distributed optimizer, overlap": Layout(
        2,
        "--engine megatron --use-distributed-optimizer --ddp-bucket-size 500 --shard-hypernetwork",
    ),
    "megatron, CP2": Layout(2, "--engine megatron --context-parallel-size 2 --shard-hypernetwork"),
}


@pytest.fixture(scope="module")
def table(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return run_table(zygote, LAYOUTS, ROUTERS.values(), tmp_path_factory.mktemp("divided"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("router", ROUTERS)
def test_layout_gives_the_run_of_one_process(
    table: Table, router: str, layout: str, record_property: Callable[[str, object], None]
) -> None:
    assert_same_run(table, ROUTERS[router], layout, record_property)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_rank_has_its_part_of_the_second_layer(table: Table, router: str, layout: str) -> None:
    """That has H numbers for each of D x E weights of the router, in each of two layers."""
    own, whole = table.runs[ROUTERS[router], layout], table.references[ROUTERS[router], ""]
    second = 4 * 256 * 32 * 4 * 2 + 4 * 32 * 4 * 2  # and its bias
    assert whole.told["frozen"] - own.told["frozen"] == second / 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_checkpoint_is_the_same(table: Table, router: str, layout: str) -> None:
    own, whole = table.runs[ROUTERS[router], layout], table.references[ROUTERS[router], ""]
    assert weight_names(own.weights) == weight_names(whole.weights)
    names = [name for name in weight_names(own.weights) if "router.frozen_" in name]
    assert names
    saved, expected = read_tensors(own.weights, names), read_tensors(whole.weights, names)
    assert all(torch.equal(saved[name], expected[name]) for name in names)


@pytest.mark.parametrize(
    ("flags", "ranks", "parts"),
    [
        ("", 4, 1),  # a small one
        ("--hidden-size 2056 --num-experts 128", 4, 4),
        ("--hidden-size 2056 --num-experts 128 --no-shard-hypernetwork", 4, 1),
        ("--hidden-size 2056 --num-experts 128 --router.name smoe_dropout", 4, 1),
        ("--hidden-size 2056 --num-experts 128", 16, 1),  # does not divide the hidden size
        ("--engine megatron --tensor-model-parallel-size 2 --shard-hypernetwork", 4, 2),
        ("--engine megatron --context-parallel-size 2 --shard-hypernetwork", 4, 4),
    ],
)
def test_number_of_parts(flags: str, ranks: int, parts: int) -> None:
    config = tiny_config([*flags.split(), "--global-batch-size", str(2 * ranks)], ranks)
    assert hypernetwork_parts(config, ranks) == parts


def test_a_router_without_a_hypernetwork_is_refused() -> None:
    with pytest.raises(ConfigError, match="the router topk has no hypernetwork"):
        tiny_config(["--router.name", "topk", "--shard-hypernetwork"])
