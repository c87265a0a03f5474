"""Similarity of experts against the formula in loops; measuring it leaves no trace in the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cka_loops import cka, linear_kernel
from torch import Tensor

from megatron_hyperrouter import build_router
from megatron_hyperrouter.analysis.experts import (
    MOST_TOKENS,
    expert_similarity,
    mean_similarity,
    open_to_routers,
)
from megatron_hyperrouter.routers.base import ROUTERS

T, D, E = 9, 5, 4


class Bank:
    """E linear experts; remembers the tokens that it was asked about."""

    def __init__(self, experts: int = E) -> None:
        self.experts_EDD = torch.randn(experts, D, D, generator=torch.Generator().manual_seed(1))
        self.asked: list[Tensor] = []

    def scores_TE(self, x_TD: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
        self.asked.append(x_TD)
        return torch.stack(
            [score((x_TD @ expert_DD).view(1, 1, *x_TD.shape)).flatten() for expert_DD in self.experts_EDD],
            -1,
        )


def test_mean_over_pairs_against_loops():
    outputs_ETD = torch.randn(E, T, D, generator=torch.Generator().manual_seed(2))
    rows = outputs_ETD.double().tolist()
    pairs = [cka(rows[i], rows[j], linear_kernel) for i in range(E) for j in range(i)]
    assert mean_similarity(outputs_ETD) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
    assert mean_similarity(outputs_ETD[:2]) == pytest.approx(cka(rows[0], rows[1], linear_kernel), rel=1e-5)
    assert mean_similarity(outputs_ETD[:1]) == 0.0
    assert mean_similarity(outputs_ETD[:1].expand(E, -1, -1)) == pytest.approx(1.0, rel=1e-5)


def test_looking_changes_no_routing_and_leaves_nothing():
    routers = [
        build_router(name, hidden_size=D, num_experts=E, topk=2, layer_number=layer)
        for layer, name in ((3, "topk"), (1, "simsmoe"))
    ]
    bank, batches = Bank(), torch.randn(2, T, D, generator=torch.Generator().manual_seed(3))
    before = [[router(x_TD) for x_TD in batches] for router in routers]
    during = []

    def evaluate() -> None:
        during.extend([router(x_TD, experts=bank) for x_TD in batches] for router in routers)

    found = expert_similarity(routers, evaluate)
    outputs_BETD = torch.einsum("btd,edf->betf", batches, bank.experts_EDD)
    expected = sum(map(mean_similarity, outputs_BETD)) / 2
    assert list(found) == [1, 3]
    assert list(found.values()) == pytest.approx([expected] * 2)
    for old, new in zip(before, during, strict=True):
        for left, right in zip(old, new, strict=True):
            assert torch.equal(left.weights_TK, right.weights_TK)
            assert torch.equal(left.experts_TK, right.experts_TK)
    assert all("refine" not in vars(router) for router in routers)
    routers[0](batches[0], experts=None)  # looks at nothing any more


def test_many_tokens_are_thinned_out():
    router, bank = build_router("topk", hidden_size=D, num_experts=E, topk=2), Bank()
    x_TD = torch.randn(2 * MOST_TOKENS + 1, D, generator=torch.Generator().manual_seed(4))
    expert_similarity([router], lambda: router(x_TD, experts=bank))
    assert torch.equal(bank.asked[0], x_TD[::3])


def test_experts_that_are_elsewhere_are_told():
    router = build_router("topk", hidden_size=D, num_experts=E, topk=2)
    with pytest.raises(RuntimeError, match="gives no access to its experts"):
        expert_similarity([router], lambda: router(torch.zeros(T, D)))
    with pytest.raises(RuntimeError, match="this rank has only 2 of the 4 experts"):
        expert_similarity([router], lambda: router(torch.zeros(T, D), experts=Bank(2)))
    assert "refine" not in vars(router)


def test_classes_are_opened_for_a_while():
    kind = ROUTERS["topk"]
    with pytest.raises(KeyError), open_to_routers(kind):
        assert kind.needs_experts
        raise KeyError
    assert not kind.needs_experts
    assert not any("needs_experts" in vars(base) and base.needs_experts for base in kind.__mro__)
