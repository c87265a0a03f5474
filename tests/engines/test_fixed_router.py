"""``--router.freeze`` in both engines: the router stays as drawn, is in the checkpoint, and the rest trains."""

from __future__ import annotations

import pytest
import torch
from engines.layout_table import Layout, Run, assert_same_run, run_table

from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names
from megatron_hyperrouter.ops import keyed

FROZEN = "--router.freeze --router.bias --router.init-std 0.3"
CASES = {
    "deepspeed, ZeRO-0": Layout(1, f"{FROZEN} --zero-stage 0"),
    "deepspeed, ZeRO-1": Layout(1, FROZEN),
    "deepspeed, ZeRO-2": Layout(1, f"{FROZEN} --zero-stage 2"),
    "megatron": Layout(1, f"{FROZEN} --engine megatron"),
    "megatron, sharded optimizer": Layout(1, f"{FROZEN} --engine megatron --use-distributed-optimizer"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Run]:
    return run_table([("topk", name, layout) for name, layout in CASES.items()], tmp_path_factory.mktemp("frozen"))


@pytest.mark.parametrize("case", CASES)
def test_a_frozen_router_stays_and_everything_else_trains(runs: dict[tuple[str, str], Run], case: str) -> None:
    run = runs["topk", case]
    for layer in range(2):
        prefix = f"decoder.layers.{layer}.mlp.router."
        saved = read_tensors(run.weights, [f"{prefix}weight_ED", f"{prefix}bias_E"])
        assert torch.equal(saved[f"{prefix}weight_ED"], keyed.normal((4, 32), seed=1234, name=f"{prefix}weight_ED") * 0.3)
        assert not saved[f"{prefix}bias_E"].any()
    assert len(weight_names(run.weights)) == len(weight_names(runs["topk", "deepspeed, ZeRO-0"].weights))
    assert run.told["steps"][-1]["lm_loss"] < run.told["steps"][0]["lm_loss"]
    assert_same_run(run, runs["topk", "deepspeed, ZeRO-0"])
