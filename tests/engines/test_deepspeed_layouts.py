"""The same settings on any layout of the DeepSpeed engine are the same run; one process agrees with a plain-torch model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from engines.layout_table import COMMON, WORKER, Layout, Run, assert_same_run, run_table
from engines.layout_worker import micro_batches, tiny_config
from reference_gpt import ReferenceGPT, train_reference

from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names
from megatron_hyperrouter.engines.base import Place
from megatron_hyperrouter.routers import ROUTERS

THREE = ("topk", "smoe_dropout", "hyper")
REFERENCE = Layout(1, "")  # ZeRO-1
TP2 = "--tensor-model-parallel-size 2"
LAYOUTS = {
    "1 rank, ZeRO-0": Layout(1, "--zero-stage 0"),
    "1 rank, ZeRO-2": Layout(1, "--zero-stage 2"),
    "DP2, ZeRO-1": Layout(2, "--zero-stage 1"),
    "DP2, ZeRO-2": Layout(2, "--zero-stage 2"),
    "EP2, ZeRO-1": Layout(2, "--expert-model-parallel-size 2"),
    "EP2, ZeRO-2": Layout(2, "--expert-model-parallel-size 2 --zero-stage 2"),
    "EP2, recompute": Layout(2, "--expert-model-parallel-size 2 --recompute-granularity full"),
    "PP2": Layout(2, "--pipeline-model-parallel-size 2"),
    "TP2": Layout(2, TP2),
    "TP2, expert-TP 1": Layout(2, f"{TP2} --expert-tensor-parallel-size 1"),
}
FOUR_RANKS = {
    "TP2 x EP2, expert-TP 2": Layout(4, f"{TP2} --expert-model-parallel-size 2"),
    "TP2 x EP2, expert-TP 1, SP": Layout(4, f"{TP2} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1 --sequence-parallel"),
    "TP2 x PP2": Layout(4, f"{TP2} --pipeline-model-parallel-size 2"),
    "PP2 x EP2": Layout(4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"),
}
Key = tuple[str, str]  # router, layout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Key, Run]:
    """Every router in every layout of up to two ranks, HyperRouter in those of four."""
    rows = [(router, name, layout) for router in THREE for name, layout in {"reference": REFERENCE, **LAYOUTS}.items()]
    rows += [("hyper", name, layout) for name, layout in FOUR_RANKS.items()]
    return run_table(rows, tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("router", THREE)
def test_layout_gives_the_run_of_one_process(runs: dict[Key, Run], router: str, layout: str) -> None:
    assert_same_run(runs[router, layout], runs[router, "reference"])


@pytest.mark.parametrize("layout", FOUR_RANKS)
def test_four_ranks_give_the_run_of_one_process(runs: dict[Key, Run], layout: str) -> None:
    assert_same_run(runs["hyper", layout], runs["hyper", "reference"])


@pytest.mark.parametrize("router", THREE)
def test_one_process_is_the_plain_model(runs: dict[Key, Run], router: str, tmp_path: Path) -> None:
    answer = runs[router, "reference"].told
    flags = ["--router.name", router, *COMMON]
    run_ranks(WORKER, {"cases": [{"flags": flags, "steps": 0, "folder": str(tmp_path / "initial")}]}, ranks=1, folder=tmp_path)
    config = tiny_config(flags)
    initial = read_tensors(tmp_path / "initial", weight_names(tmp_path / "initial"))
    weights = {name: tensor for name, tensor in initial.items() if tensor.is_floating_point()}
    model = ReferenceGPT(config, weights, lambda weights, layer: router_matrix(router, config, weights, layer))
    here = Place(rank=0, world_size=1, data_rank=0, data_size=1)
    steps = [(list(micro_batches(config, here, step)), topk) for step, topk in enumerate((1, 1, 2, 2, 4, 4))]
    expected = train_reference(model, steps, config.optimizer.lr)
    assert [(step["lm_loss"], step["grad_norm"]) for step in answer["steps"]] == [pytest.approx(pair, rel=1e-5) for pair in expected]


def router_matrix(name: str, config: Any, weights: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    """A layer's routing matrix in float64, written out anew for each method."""
    prefix = f"decoder.layers.{layer}.mlp.router."
    if name == "topk":
        return weights[prefix + "weight_ED"]
    router = ROUTERS[name](
        config.router.options, hidden_size=config.model.hidden_size, num_experts=config.model.num_experts, topk=1,
        layer_number=layer + 1, seed=config.train.seed,
    )  # fmt: skip
    if name == "smoe_dropout":
        return router.linear()[0].double()
    w1_HS, b1_H, w2_HP, b2_P = (tensor.double() for tensor in router.frozen_tensors(torch.device("cpu")))
    hidden_H = (w1_HS @ weights[prefix + "embedding_S"] + b1_H).clamp(min=0)
    return (hidden_H @ w2_HP + b2_P).view(config.model.num_experts, config.model.hidden_size)
