"""``--router.freeze`` in both engines: the router stays as drawn, is in the checkpoint, and the rest
trains.
"""

from __future__ import annotations

import pytest
import torch
from engines.layout_table import TOLERANCES, Layout, Table, run_table
from program.launched import Zygote

from megatron_hyperrouter.checkpoint.weights import read_tensors
from megatron_hyperrouter.ops import keyed

FROZEN = "--router.freeze --router.bias --router.init-std 0.3"
LAYOUTS = {
    "deepspeed, ZeRO-0": Layout(1, "--zero-stage 0", FROZEN),
    "deepspeed, ZeRO-2": Layout(1, "--zero-stage 2", FROZEN),
    "megatron": Layout(1, "--engine megatron", FROZEN),
    "megatron, sharded optimizer": Layout(1, "--engine megatron --use-distributed-optimizer", FROZEN),
}


@pytest.fixture(scope="module")
def table(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return run_table(zygote, LAYOUTS, ["topk"], tmp_path_factory.mktemp("frozen"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_frozen_router_stays_and_everything_else_trains(table: Table, name: str) -> None:
    run, reference = table.runs["topk", name], table.references["topk", FROZEN]
    for layer in range(2):
        prefix = f"decoder.layers.{layer}.mlp.router."
        for folder in (run.weights, run.probed, reference.weights):
            saved = read_tensors(folder, [f"{prefix}weight_ED", f"{prefix}bias_E"])
            assert torch.equal(
                saved[f"{prefix}weight_ED"], keyed.normal((4, 32), seed=1234, name=f"{prefix}weight_ED") * 0.3
            )
            assert not saved[f"{prefix}bias_E"].any()
    assert run.told["steps"][-1]["lm_loss"] != run.told["steps"][0]["lm_loss"]
    found = table.differences("topk", name)
    del found["gradients"]  # relative to the largest of a parameter's: the router has none
    assert {number: told for number, told in found.items() if not told[0] <= TOLERANCES[number]} == {}
