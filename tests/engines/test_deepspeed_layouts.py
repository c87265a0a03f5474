"""The same settings on any layout of the DeepSpeed engine are the same run; one process agrees with a
plain-torch model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from engines.layout_table import COMMON, PROBED, STEPS, THREE, WORKER, Layout, Table, gradients, same_runs
from engines.layout_worker import PROBE_TOKENS, SCALE, micro_batches, tiny_config
from program.launched import Zygote
from reference_gpt import ReferenceGPT, train_reference

from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names
from megatron_hyperrouter.engines.base import RankPlace
from megatron_hyperrouter.routers import ROUTERS

TP2 = "--tensor-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
ETP1 = "--expert-tensor-parallel-size 1"
ZERO_1 = {  # the default; pipelines have no other
    "DP2": Layout(2),
    "EP2": Layout(2, EP2),
    "EP2, recompute": Layout(2, f"{EP2} --recompute-granularity full"),
    "TP2": Layout(2, TP2),
    "TP2, SP": Layout(2, f"{TP2} --sequence-parallel"),
    "TP2, expert-TP 1": Layout(2, f"{TP2} {ETP1}"),
    "PP2": Layout(2, PP2),
    "TP2 x EP2, expert-TP 2": Layout(4, f"{TP2} {EP2}"),
    "TP2 x EP2, expert-TP 1, SP": Layout(4, f"{TP2} {EP2} {ETP1} --sequence-parallel"),
    "TP2 x PP2": Layout(4, f"{TP2} {PP2}"),
    "PP2 x EP2": Layout(4, f"{PP2} {EP2}"),
}
NOT_TWICE = ("EP2, recompute", "TP2, SP")
# One process runs ZeRO only with a file of its own; gradients above 2000 numbers bypass this one's bucket.
SMALL_BUCKET = f"--deepspeed-config {Path(__file__).with_name('small_bucket.json')}"
LAYOUTS = {
    "1 rank, ZeRO-1": Layout(1, SMALL_BUCKET),
    "1 rank, ZeRO-2": Layout(1, f"--zero-stage 2 {SMALL_BUCKET}"),
    "DP2, ZeRO-2, small bucket": Layout(2, f"--zero-stage 2 {SMALL_BUCKET}"),
    "EP2, ZeRO-1, small bucket": Layout(2, f"{EP2} {SMALL_BUCKET}"),
    **{f"{name}, ZeRO-1": layout for name, layout in ZERO_1.items()},
    **{
        f"{name}, ZeRO-2": layout._replace(flags=f"{layout.flags} --zero-stage 2")
        for name, layout in ZERO_1.items()
        if PP2 not in layout.flags and name not in NOT_TWICE
    },
}

table, test_layout_gives_the_run_of_one_process = same_runs(LAYOUTS)


@pytest.mark.parametrize("router", THREE)
def test_one_process_is_the_plain_model(table: Table, router: str, tmp_path: Path, zygote: Zygote) -> None:
    found = table.references[router, ""]
    flags = ["--router.name", router, *COMMON]
    initial = tmp_path / "initial"
    run_ranks(
        zygote,
        WORKER,
        {"cases": [{"flags": flags, "steps": 0, "folder": str(initial)}]},
        ranks=1,
        folder=tmp_path,
    )
    config = tiny_config(flags)
    model = plain_model(router, config, initial)
    steps = [(list(micro_batches(config, HERE, step)), topk) for step, topk in enumerate((1, 2, 4))]
    expected = train_reference(model, steps, config.optimizer.lr)
    assert len(expected) == STEPS
    assert [(step["lm_loss"], step["grad_norm"]) for step in found.told["steps"]] == [
        pytest.approx(pair, rel=1e-5) for pair in expected
    ]


@pytest.mark.parametrize("router", THREE)
def test_gradients_of_one_process_are_those_of_the_plain_model(table: Table, router: str) -> None:
    found = table.references[router, ""]
    config = tiny_config(["--router.name", router, *COMMON])
    model = plain_model(router, config, found.weights)
    ((_, norm),) = train_reference(
        model, [(list(micro_batches(config, HERE, PROBE_TOKENS)), (1, 2, 4)[PROBED])], 0.0
    )
    told = gradients(found, found.weights)
    assert told.keys() == model.weights.keys()
    for name, weight in model.weights.items():
        assert weight.grad is not None
        expected = weight.grad * SCALE  # clipped already
        assert float((told[name] - expected).abs().max() / expected.abs().max()) <= 1e-5, name
    assert norm > config.optimizer.clip_grad  # so clipping is in it


HERE = RankPlace(rank=0, world_size=1, data_rank=0, data_size=1)


def plain_model(router: str, config: Any, folder: Path) -> ReferenceGPT:
    """With the weights in ``folder``."""
    saved = read_tensors(folder, weight_names(folder))
    weights = {name: tensor for name, tensor in saved.items() if tensor.is_floating_point()}
    return ReferenceGPT(config, weights, lambda weights, layer: router_matrix(router, config, weights, layer))


def router_matrix(name: str, config: Any, weights: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    """A layer's routing matrix in float64, written out anew for each method."""
    prefix = f"decoder.layers.{layer}.mlp.router."
    if name == "topk":
        return weights[prefix + "weight_ED"]
    router = ROUTERS[name](
        config.router.options, hidden_size=config.model.hidden_size,
        num_experts=config.model.num_experts, topk=1,
        layer_number=layer + 1, seed=config.train.seed,
    )  # fmt: skip
    if name == "smoe_dropout":
        return router.linear()[0].double()
    w1_HS, b1_H, w2_HP, b2_P = (tensor.double() for tensor in router.frozen_tensors(torch.device("cpu")))
    hidden_H = (w1_HS @ weights[prefix + "embedding_S"] + b1_H).clamp(min=0)
    return (hidden_H @ w2_HP + b2_P).view(config.model.num_experts, config.model.hidden_size)
