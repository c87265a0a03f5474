"""HyperRouter with an embedding for each expert: each row of its router is that of a HyperRouter of one
embedding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_hyperrouter import build_router
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.ops import keyed
from megatron_hyperrouter.routers.hyper import HyperRouter

D, E, S = 12, 6, 7


def hyper(*, each: bool = True, **changes: Any) -> HyperRouter:
    sizes = {"hidden_size": D, "num_experts": E, "topk": 2, "layer_number": 3, "seed": 5}
    router = build_router(
        "hyper",
        **{**sizes, "hypernet_width": 20, "embedding_size": S, "per_expert_embedding": each, **changes},
    )
    assert isinstance(router, HyperRouter)
    return router


def by_rows(router: HyperRouter) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The router's matrix and bias, row by row out of routers with a single embedding."""
    one = hyper(each=False, bias=router.config.bias)
    rows, biases = [], []
    for expert, embedding_S in enumerate(router.embedding_S.detach().view(E, S)):
        with torch.no_grad():
            one.embedding_S.copy_(embedding_S)
        one.begin_step()
        W_ED, b_E = one.linear()
        rows.append(W_ED[expert].detach())
        biases.append(None if b_E is None else b_E[expert].detach())
    held = [each for each in biases if each is not None]
    return torch.stack(rows), torch.stack(held) if held else None


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_each_row_is_that_of_a_router_with_its_embedding(bias: bool, held: bool) -> None:
    router = hyper(bias=bias)
    router.hold(held)
    W_ED, b_E = router.linear()
    rows_ED, biases_E = by_rows(router)
    torch.testing.assert_close(W_ED.detach(), rows_ED, rtol=1e-5, atol=1e-6)
    if bias:
        assert b_E is not None and biases_E is not None
        torch.testing.assert_close(b_E.detach(), biases_E, rtol=1e-5, atol=1e-6)
    else:
        assert b_E is None and biases_E is None


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_is_that_of_finite_differences(bias: bool, held: bool) -> None:
    router = hyper(bias=bias)
    router.hold(held)
    x_TD = torch.randn(9, D)

    def loss(embedding_S: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            router.embedding_S.copy_(embedding_S)
        router.begin_step()
        return router(x_TD).logits_TE.square().mean()

    start = router.embedding_S.detach().clone()
    (ours,) = torch.autograd.grad(loss(start), router.embedding_S)
    steps = 1e-3 * torch.eye(E * S)
    with torch.no_grad():
        found = torch.stack([(loss(start + step) - loss(start - step)) / 2e-3 for step in steps])
    assert (ours - found).norm() < 0.01 * found.norm()


def test_a_row_learns_from_its_own_expert_alone() -> None:
    router = hyper()
    (gradient,) = torch.autograd.grad(router(torch.randn(9, D)).logits_TE[:, 4].sum(), router.embedding_S)
    assert [bool(row.any()) for row in gradient.view(E, S)] == [number == 4 for number in range(E)]


def test_its_logits_start_with_unit_standard_deviation() -> None:
    variances = []
    for layer in range(1, 17):
        router = hyper(layer_number=layer, hidden_size=64, embedding_size=64, hypernet_width=256)
        x_TD = keyed.normal((256, 64), seed=layer, name="x")
        variances.append(router(x_TD).logits_TE.detach().square().mean().item())
    assert sum(variances) / 16 == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("bias", [False, True])
def test_it_folds_into_a_plain_router(bias: bool) -> None:
    router, x_TD = hyper(bias=bias), torch.randn(64, D)
    folded = router.fold()
    for k in (1, 2, E):
        own, plain = router(x_TD, topk=k), folded(x_TD, topk=k)
        assert torch.equal(own.experts_TK, plain.experts_TK)
        torch.testing.assert_close(own.weights_TK, plain.weights_TK, rtol=0, atol=1e-6)


def test_it_takes_the_place_of_a_given_router() -> None:
    given_ED = 0.2 * torch.randn(E, D)
    router = hyper(anchor=True)
    router.anchor_at(given_ED)
    torch.testing.assert_close(router.linear()[0].detach(), given_ED, rtol=0, atol=1e-6)


def test_what_is_saved_and_what_is_refused() -> None:
    """The frozen part is that of a single embedding, so the embedding's length tells them apart."""
    router = hyper()
    assert {key: tuple(tensor.shape) for key, tensor in router.state_dict().items()} == {
        "embedding_S": (E * S,),
        "frozen_seed": (1,),
        "frozen_hash": (32,),
    }
    assert router.frozen.digest == hyper(each=False).frozen.digest
    with pytest.raises(RuntimeError, match="embedding_S"):
        hyper(each=False).load_state_dict(router.state_dict())
    with pytest.raises(CheckpointError, match="frozen_hash"):
        hyper(each=False, embedding_size=E * S).load_state_dict(router.state_dict())
