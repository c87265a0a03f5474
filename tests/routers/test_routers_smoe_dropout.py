"""The frozen random router."""

from __future__ import annotations

import math
import pickle
from functools import partial

import pytest
import torch

from megatron_hyperrouter import build_router
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.ops import keyed
from megatron_hyperrouter.ops.schedule import topk_at
from megatron_hyperrouter.routers.frozen import FrozenTensors


def small(**changes):
    return build_router(
        "smoe_dropout",
        **{"hidden_size": 16, "num_experts": 8, "topk": 2, "layer_number": 2, "seed": 9, **changes},
    )


def test_weights_are_the_named_stream_and_nothing_is_trained_or_saved():
    router = small()
    W_ED, b_E = router.linear()
    assert torch.equal(W_ED, keyed.normal((8, 16), seed=9, name="smoe_dropout.layer2.weight") * 0.02)
    assert b_E is None
    assert not list(router.parameters())
    assert {key: tuple(tensor.shape) for key, tensor in router.state_dict().items()} == {
        "frozen_seed": (1,),
        "frozen_hash": (32,),
    }


def test_linear_is_a_copy():
    router = small()
    router.linear()[0].zero_()
    assert router.linear()[0].any()


def test_tokens_get_a_gradient():
    x_TD = torch.randn(4, 16, requires_grad=True)
    small()(x_TD).weights_TK[:, 0].sum().backward()
    assert x_TD.grad.any(1).all()


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"seed": 8}, "--router.seed 9"),
        ({"init_std": 0.1}, "config.yaml"),
        ({"layer_number": 1}, "config.yaml"),
    ],
)
def test_other_frozen_weights_are_refused(change, remedy):
    with pytest.raises(
        CheckpointError, match="was trained with frozen router weights drawn from seed 9"
    ) as caught:
        small(**change).load_state_dict(small().state_dict())
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_state_that_was_converted_to_one_dtype_is_read(dtype):
    state = {key: tensor.to(dtype) for key, tensor in small().state_dict().items()}
    small().load_state_dict(state)
    with pytest.raises(CheckpointError, match="frozen router weights"):
        small(seed=8).load_state_dict(state)


def test_a_pickle_from_a_gpu_is_read_on_a_machine_without_one():
    here = small().frozen
    value = FrozenTensors(here.recipe, here.tensors, here.digest)
    value.device = torch.device("cuda", 7)
    assert pickle.loads(pickle.dumps(value)).device.type == "cpu"


def test_weights_against_loops_and_layers_differ():
    router, x_TD = small(init_std=0.5), torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    routing = router(x_TD)
    W = router.linear()[0].double().tolist()
    for x, weights, experts in zip(
        x_TD.double().tolist(), routing.weights_TK.tolist(), routing.experts_TK.tolist(), strict=True
    ):
        logits = [math.fsum(w * v for w, v in zip(row, x, strict=True)) for row in W]
        assert experts == sorted(range(8), key=lambda e: -logits[e])[:2]
        powers = [math.exp(logits[e]) for e in experts]
        assert weights == pytest.approx([power / sum(powers) for power in powers], abs=1e-6)
    assert not torch.equal(small(layer_number=1).linear()[0], small(layer_number=2).linear()[0])


def published(kind: str, step: int, start: int, end: int, steps: int) -> int:
    """k by the formulas of SMoE-Dropout's code, as functions of completed steps."""
    if step >= steps:
        return end
    if kind == "linear":
        return min(max(round((end - start) * step / steps) + start, start), end)
    if kind == "cosine":
        return round((start - end) * math.cos(math.pi * step / (2 * steps))) + end
    if kind == "exponential":
        return round((start - end) * 0.99 ** (step // (steps // 300))) + end
    return {"multistep": [1, 2, 4, 8][4 * step // steps], "constant": end}[kind]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "exponential", "multistep"])
def test_every_schedule_of_k_is_followed_and_evaluation_leaves_it_alone(kind):
    router = small(topk=partial(topk_at, start=1, end=8, steps=600, kind=kind))
    x_TD = torch.ones(1, 16)
    for step in range(0, 640, 7):
        assert router(x_TD, step=step, topk=2).experts_TK.size(1) == 2
        assert router(x_TD, step=step).experts_TK.size(1) == published(kind, step, 1, 8, 600), step
