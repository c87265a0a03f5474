"""The same settings on any layout of the DeepSpeed engine are the same run; one process agrees with a plain-torch model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from engines.layout_worker import micro_batches, tiny_config
from reference_gpt import ReferenceGPT, train_reference

from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names
from megatron_hyperrouter.engines.base import Place
from megatron_hyperrouter.routers import ROUTERS

WORKER = Path(__file__).with_name("layout_worker.py")
THREE = ("topk", "smoe_dropout", "hyper")
# k = 1, 2, 4 of 4 experts, two steps each; Adam's epsilon keeps rounding noise in tiny gradients from becoming whole steps.
COMMON = "--moe-router-topk 4 --topk-start 1 --topk-schedule multistep --topk-schedule-steps 6 --adam-eps 1e-4".split()
STEPS = 6
LAYOUTS = {
    "1 rank, ZeRO-0": (1, "--zero-stage 0"),
    "1 rank, ZeRO-2": (1, "--zero-stage 2"),
    "DP2, ZeRO-1": (2, "--zero-stage 1"),
    "DP2, ZeRO-2": (2, "--zero-stage 2"),
    "EP2, ZeRO-1": (2, "--expert-model-parallel-size 2"),
    "EP2, ZeRO-2": (2, "--expert-model-parallel-size 2 --zero-stage 2"),
    "EP2, recompute": (2, "--expert-model-parallel-size 2 --recompute-granularity full"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
}
Key = tuple[str, str]  # router, layout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Key, tuple[dict[str, Any], Path]]:
    """Every router x layout: (numbers, folder of the final weights)."""
    root = tmp_path_factory.mktemp("layouts")
    table = {"1 rank, ZeRO-1": (1, ""), **LAYOUTS}
    found: dict[Key, tuple[dict[str, Any], Path]] = {}
    for ranks in (1, 2):
        keys = [(router, name) for router in THREE for name, (need, _) in table.items() if need == ranks]
        folders = [root / f"{ranks}-{index}" for index in range(len(keys))]
        cases = [
            {
                "flags": ["--router.name", router, *COMMON, *table[name][1].split()],
                "steps": STEPS,
                "folder": str(folder),
                "topk_eval": [1, 3],
            }
            for (router, name), folder in zip(keys, folders, strict=True)
        ]
        answers = run_ranks(WORKER, {"cases": cases}, ranks=ranks, folder=root / f"ranks{ranks}")
        found.update({key: (answer, folder) for key, answer, folder in zip(keys, answers, folders, strict=True)})
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("router", THREE)
def test_layout_gives_the_run_of_one_process(runs: dict[Key, tuple[dict[str, Any], Path]], router: str, layout: str) -> None:
    (found, folder), (expected, reference) = runs[router, layout], runs[router, "1 rank, ZeRO-1"]
    for step, (one, other) in enumerate(zip(found["steps"], expected["steps"], strict=True)):
        for number in ("lm_loss", "grad_norm", "aux_loss", "z_loss", "entropy", "load"):
            assert one[number] == pytest.approx(other[number], rel=1e-5), (step, number)
    names = weight_names(reference)
    assert weight_names(folder) == names
    weights, others = read_tensors(folder, names), read_tensors(reference, names)
    for name in names:  # six Adam steps of up to 3e-3
        torch.testing.assert_close(weights[name], others[name], rtol=0, atol=1e-6, msg=name)
    # Evaluation has one micro-batch of its own on each data-parallel rank, and still the same tokens in all.
    assert found["evaluations"] == pytest.approx(expected["evaluations"], rel=1e-5)


@pytest.mark.parametrize("router", THREE)
def test_one_process_is_the_plain_model(runs: dict[Key, tuple[dict[str, Any], Path]], router: str, tmp_path: Path) -> None:
    answer, _ = runs[router, "1 rank, ZeRO-1"]
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
