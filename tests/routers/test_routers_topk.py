"""The trained linear router."""

from __future__ import annotations

import pytest
import torch

from megatron_hyperrouter import build_router
from megatron_hyperrouter.ops.topk import softmax_topk


def test_initial_weights():
    router = build_router("topk", hidden_size=500, num_experts=32, topk=2, bias=True, init_std=0.3)
    assert float(router.weight_ED.detach().std()) == pytest.approx(0.3, rel=0.05)
    assert not router.bias_E.any()
    assert list(build_router("topk", hidden_size=4, num_experts=2, topk=1).state_dict()) == ["weight_ED"]


def test_logits_are_those_of_a_linear_layer():
    router = build_router("topk", hidden_size=6, num_experts=4, topk=2, bias=True)
    with torch.no_grad():
        router.bias_E.copy_(torch.arange(4.0))
    x_TD = torch.randn(5, 6)
    W, b, x = router.weight_ED.tolist(), router.bias_E.tolist(), x_TD.tolist()
    loops = [[sum(w * v for w, v in zip(W[e], row, strict=True)) + b[e] for e in range(4)] for row in x]
    torch.testing.assert_close(router(x_TD).logits_TE, torch.tensor(loops))


def test_switch_weighs_by_probability():
    router = build_router("topk", hidden_size=6, num_experts=4, topk=1, pre_softmax=True, init_std=1.0)
    routing = router(torch.randn(5, 6))
    weights_TK, experts_TK = softmax_topk(routing.logits_TE, 1)
    assert torch.equal(routing.weights_TK, weights_TK)
    assert torch.equal(routing.experts_TK, experts_TK)
    assert torch.equal(router.fold()(torch.ones(3, 6)).weights_TK, router(torch.ones(3, 6)).weights_TK)
