"""A HyperRouter in the place of a given router: equal at the start, and its embedding alone learns."""

from __future__ import annotations

from copy import deepcopy

import torch

from megatron_hyperrouter import build_router
from megatron_hyperrouter.routers.hyper import HyperRouter

SIZES = {"hidden_size": 24, "num_experts": 8, "topk": 2, "layer_number": 1, "seed": 7}


def anchored(given_ED: torch.Tensor) -> HyperRouter:
    router = build_router("hyper", **SIZES, anchor=True)
    assert isinstance(router, HyperRouter)
    router.anchor_at(given_ED)
    return router


def test_it_routes_as_the_given_router_does() -> None:
    given_ED, x_TD = 0.2 * torch.randn(8, 24), torch.randn(64, 24)
    plain = build_router("topk", **SIZES)
    plain.load_state_dict({"weight_ED": given_ED})
    for router in (anchored(given_ED), anchored(given_ED).fold()):
        for k in (1, 2, 8):
            own, expected = router(x_TD, topk=k), plain(x_TD, topk=k)
            assert torch.equal(own.experts_TK, expected.experts_TK)
            torch.testing.assert_close(own.weights_TK, expected.weights_TK, rtol=0, atol=2e-6)


def test_a_held_router_agrees_and_only_the_embedding_learns() -> None:
    given_ED, x_TD = 0.2 * torch.randn(8, 24), torch.randn(16, 24)
    router = anchored(given_ED)
    held = deepcopy(router)
    held.hold(True)
    gradients = []
    for each in (router, held):
        assert [name for name, _ in each.named_parameters()] == ["embedding_S"]
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            (each(x_TD).weights_TK[:, 0] ** 2).sum().backward()
            optimizer.step()
            each.begin_step()
        gradients.append(each.embedding_S.grad)
    torch.testing.assert_close(router.linear()[0], held.linear()[0])
    torch.testing.assert_close(*gradients)
    moved = router.linear()[0] - given_ED
    assert moved.abs().max() > 1e-4  # it learns


def test_the_anchor_is_saved_and_stays_float32() -> None:
    router = anchored(0.2 * torch.randn(8, 24))
    other = build_router("hyper", **SIZES, anchor=True)
    other.load_state_dict(router.state_dict())
    torch.testing.assert_close(other.linear()[0], router.linear()[0], rtol=0, atol=0)
    assert other.to(torch.bfloat16).anchor_ED.dtype == torch.float32
