"""The frozen random router."""

from __future__ import annotations

import pytest
import torch

from megatron_hyperrouter import build_router
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.ops import keyed


def small(**changes):
    return build_router("smoe_dropout", **{"hidden_size": 16, "num_experts": 8, "topk": 2, "layer_number": 2, "seed": 9, **changes})


def test_weights_are_the_named_stream_and_nothing_is_trained_or_saved():
    router = small()
    W_ED, b_E = router.linear()
    assert torch.equal(W_ED, keyed.normal((8, 16), seed=9, name="smoe_dropout.layer2.weight") * 0.02)
    assert b_E is None
    assert not list(router.parameters())
    assert {key: tuple(tensor.shape) for key, tensor in router.state_dict().items()} == {"frozen_seed": (1,), "frozen_hash": (32,)}


def test_linear_is_a_copy():
    router = small()
    router.linear()[0].zero_()
    assert router.linear()[0].any()


def test_tokens_get_a_gradient():
    x_TD = torch.randn(4, 16, requires_grad=True)
    small()(x_TD).weights_TK[:, 0].sum().backward()
    assert x_TD.grad.any(1).all()


@pytest.mark.parametrize(
    ("change", "remedy"), [({"seed": 8}, "--router.seed 9"), ({"init_std": 0.1}, "config.yaml"), ({"layer_number": 1}, "config.yaml")]
)
def test_other_frozen_weights_are_refused(change, remedy):
    with pytest.raises(CheckpointError, match="frozen_hash: the checkpoint was trained with frozen weights of seed 9") as caught:
        small(**change).load_state_dict(small().state_dict())
    assert remedy in caught.value.remedy
