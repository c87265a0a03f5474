"""PR-MoE's residual layers: one run on every layout, and that of a plain-torch model; DeepSpeed's own layer
is their definition.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from engines.layout_table import COMMON, WORKER, Layout, Table, assert_same_run, run_table
from engines.layout_worker import micro_batches, tiny_config
from program.launched import Zygote
from reference_gpt import ReferenceGPT, train_reference
from torch import Tensor

from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names
from megatron_hyperrouter.engines.base import RankPlace

RESIDUAL = "--mlp-type residual"
TP2 = "--tensor-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
ETP1 = "--expert-tensor-parallel-size 1"
LAYOUTS = {
    "EP2, ZeRO-2": Layout(2, f"{EP2} --zero-stage 2", RESIDUAL),
    "TP2": Layout(2, TP2, RESIDUAL),
    "TP2, SP, expert-TP 1": Layout(2, f"{TP2} --sequence-parallel {ETP1}", RESIDUAL),
    "PP2, recompute": Layout(2, "--pipeline-model-parallel-size 2 --recompute-granularity full", RESIDUAL),
    "TP2 x EP2, SP, expert-TP 1": Layout(4, f"{TP2} --sequence-parallel {EP2} {ETP1}", RESIDUAL),
}


@pytest.fixture(scope="module")
def table(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Table:
    """One router on all layouts."""
    return run_table(
        zygote,
        {**LAYOUTS, "bf16": Layout(1, "--bf16", RESIDUAL)},
        ["topk"],
        tmp_path_factory.mktemp("residual"),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_run_of_one_process(
    table: Table, layout: str, record_property: Callable[[str, object], None]
) -> None:
    assert_same_run(table, "topk", layout, record_property)


def test_bf16_within_its_rounding(table: Table) -> None:
    """A relative error of 2^-9 at each rounding, which mostly cancels in a mean over 128 tokens."""
    steps, others = table.runs["topk", "bf16"].told["steps"], table.references["topk", RESIDUAL].told["steps"]
    for found, expected in zip(steps, others, strict=True):
        assert (
            found["lm_loss"] == pytest.approx(expected["lm_loss"], rel=2**-9)
            and found["lm_loss"] != expected["lm_loss"]
        )


class ResidualGPT(ReferenceGPT):
    """``c_0 MoE(x) + c_1 MLP(x)``, ``c = softmax(W x + b)``."""

    def _moe(self, x_BSD: Tensor, layer: int, topk: int) -> tuple[Tensor, Tensor, Tensor]:
        out_BSD, aux, z = super()._moe(x_BSD, layer, topk)
        prefix = f"decoder.layers.{layer}.mlp."
        gate, up = (x_BSD @ self.weights[prefix + "residual.linear_fc1.weight"].t()).chunk(2, -1)
        dense_BSD = (gate * gate.sigmoid() * up) @ self.weights[prefix + "residual.linear_fc2.weight"].t()
        scores = (
            x_BSD @ self.weights[prefix + "coefficient.weight"].t()
            + self.weights[prefix + "coefficient.bias"]
        )
        first = 1 / (1 + (scores[..., 1:] - scores[..., :1]).exp())
        return first * out_BSD + (1 - first) * dense_BSD, aux, z


def test_one_process_is_the_plain_model(table: Table, tmp_path: Path, zygote: Zygote) -> None:
    flags = ["--router.name", "topk", *COMMON, *RESIDUAL.split()]
    run_ranks(
        zygote,
        WORKER,
        {"cases": [{"flags": flags, "steps": 0, "folder": str(tmp_path / "initial")}]},
        ranks=1,
        folder=tmp_path,
    )
    config = tiny_config(flags)
    weights = read_tensors(tmp_path / "initial", weight_names(tmp_path / "initial"))
    for layer in range(config.model.num_layers):
        assert not weights[
            f"decoder.layers.{layer}.mlp.coefficient.bias"
        ].any()  # both halves start as equals
    model = ResidualGPT(
        config, weights, lambda weights, layer: weights[f"decoder.layers.{layer}.mlp.router.weight_ED"]
    )
    here = RankPlace(rank=0, world_size=1, data_rank=0, data_size=1)
    steps = [(list(micro_batches(config, here, step)), topk) for step, topk in enumerate((1, 2, 4))]
    expected = train_reference(model, steps, config.optimizer.lr)
    run = table.references["topk", RESIDUAL]
    assert [(step["lm_loss"], step["grad_norm"]) for step in run.told["steps"]] == [
        pytest.approx(pair, rel=1e-5) for pair in expected
    ]
    final = read_tensors(run.weights, list(weights))
    for name, weight in model.weights.items():
        torch.testing.assert_close(final[name].double(), weight.detach(), rtol=0, atol=1e-6, msg=name)
