"""Experts in grouped products give the same run as a loop over experts, with every dispatcher.

The reference is one process of the DeepSpeed engine, which is a plain float64 model elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from engines.layout_table import COMMON, WORKER, Layout, Table, assert_same_run, run_table
from program.launched import Zygote

from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names

GROUPED, LOOP = "--moe-grouped-gemm", "--no-moe-grouped-gemm"
MEGATRON = "--engine megatron"
TP2, EP2 = "--tensor-model-parallel-size 2", "--expert-model-parallel-size 2"
CAPACITY = "--moe-expert-capacity-factor 0.7"
LAYOUTS = {
    "deepspeed": Layout(1, GROUPED),
    "deepspeed, loop": Layout(1, LOOP),
    "megatron": Layout(1, f"{MEGATRON} {GROUPED}"),
    "megatron, loop": Layout(1, f"{MEGATRON} {LOOP}"),
    "deepspeed, EP2": Layout(2, f"{EP2} {GROUPED}"),
    "megatron, EP2": Layout(2, f"{MEGATRON} {EP2} {GROUPED}"),
    "megatron, EP2, allgather": Layout(
        2, f"{MEGATRON} {EP2} --moe-token-dispatcher-type allgather {GROUPED}"
    ),
    "megatron, EP2, loop": Layout(2, f"{MEGATRON} {EP2} {LOOP}"),
    "deepspeed, TP2, loop": Layout(2, f"{TP2} {LOOP}"),
    "deepspeed, TP2 x EP2": Layout(4, f"{TP2} {EP2} {GROUPED}"),
    "megatron, TP2 x EP2": Layout(4, f"{MEGATRON} {TP2} --sequence-parallel {EP2} {GROUPED}"),
}
WITH_CAPACITY = {
    f"{name}, capacity": LAYOUTS[name]._replace(settings=CAPACITY)
    for name in ("deepspeed", "megatron", "deepspeed, loop", "deepspeed, EP2", "megatron, EP2")
}
ROUTERS = {
    "hyper": "hyper",
    "competesmoe": "competesmoe --router.rate 0.6 --router.warm-up 0 --router.max-competing 1",
}


@pytest.fixture(scope="module")
def table(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Table:
    layouts = {**LAYOUTS, **WITH_CAPACITY}
    return run_table(zygote, layouts, ROUTERS.values(), tmp_path_factory.mktemp("grouped"))


@pytest.mark.parametrize("layout", [*LAYOUTS, *WITH_CAPACITY])
@pytest.mark.parametrize("router", ROUTERS)
def test_is_the_run_of_a_loop(
    table: Table, router: str, layout: str, record_property: Callable[[str, object], None]
) -> None:
    assert_same_run(table, ROUTERS[router], layout, record_property)


def test_weights_go_between_loop_and_groups_bit_for_bit(zygote: Zygote, tmp_path: Path) -> None:
    """Names and shapes on disk are those of single experts, whoever writes and whoever reads."""
    flags = ["--router.name", "hyper", *COMMON, *EP2.split()]
    folders = {name: str(tmp_path / name) for name in ("loop", "grouped", "megatron", "loop again")}
    cases = [
        {"flags": [*flags, LOOP], "steps": 2, "folder": folders["loop"]},
        {"flags": [*flags, GROUPED], "load_weights": folders["loop"], "folder": folders["grouped"]},
        {
            "flags": [*flags, *MEGATRON.split(), GROUPED],
            "load_weights": folders["grouped"],
            "folder": folders["megatron"],
        },
        {"flags": [*flags, LOOP], "load_weights": folders["megatron"], "folder": folders["loop again"]},
    ]
    for case in cases[1:]:
        case["steps"] = 0
    run_ranks(zygote, WORKER, {"cases": cases}, ranks=2, folder=tmp_path / "ranks")
    first = read_tensors(Path(folders["loop"]), weight_names(Path(folders["loop"])))
    assert "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight" in first
    for name in ("grouped", "megatron", "loop again"):
        found = read_tensors(Path(folders[name]), weight_names(Path(folders[name])))
        assert found.keys() == first.keys()
        assert all(torch.equal(found[each], first[each]) for each in first), name


def test_shapes_are_those_of_single_experts(zygote: Zygote, tmp_path: Path) -> None:
    """What the start of a run counts its parameters from."""
    told = {}
    for flag in (GROUPED, LOOP):
        cases = [{"flags": ["--router.name", "topk", *EP2.split(), flag], "steps": 0, "shapes": True}]
        told[flag] = run_ranks(zygote, WORKER, {"cases": cases}, ranks=2, folder=tmp_path / flag)[0]["shapes"]
    assert told[GROUPED] == told[LOOP]
    assert told[LOOP]["decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight"] == [96, 32]
