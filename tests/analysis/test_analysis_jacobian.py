"""The router's part of a layer's Jacobian against autograd of the whole layer in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_hyperrouter import build_router
from megatron_hyperrouter.analysis import jacobian
from megatron_hyperrouter.analysis.jacobian import Experts, drift, effective_rank, inside_span, span
from megatron_hyperrouter.ops.topk import topk_softmax

T, D, E, F = 5, 12, 6, 8


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def experts() -> Experts:
    return Experts(drawn(E, 2 * F, D, seed=1) / 3, drawn(E, D, F, seed=2) / 3)


def layer(x_D: Tensor, experts: Experts, weight_ED: Tensor, k: int) -> Tensor:
    """One token through a loop over its experts."""
    weights_K, experts_K = topk_softmax((weight_ED @ x_D)[None], k)
    total = torch.zeros_like(x_D)
    for weight, expert in zip(weights_K[0], experts_K[0].tolist(), strict=True):
        gate_F, up_F = (experts.w1_EGD[expert] @ x_D).chunk(2)
        total = total + weight * (experts.w2_EDF[expert] @ (gate_F * gate_F.sigmoid() * up_F))
    return total


@pytest.mark.parametrize("k", [1, 2, 4, E])
def test_against_autograd(experts: Experts, k: int) -> None:
    x_TD, weight_ED = drawn(T, D, seed=3), drawn(E, D, seed=4) / 2
    weights_TK, experts_TK = topk_softmax(x_TD @ weight_ED.T, k)
    slopes = jacobian.weight_slopes(lambda x: topk_softmax(x @ weight_ED.T, k)[0], x_TD)
    found = jacobian.measure(experts, x_TD, weights_TK, experts_TK, slopes)
    shares, ranks, mean_DD = [], [], torch.zeros(D, D, dtype=torch.float64)
    for x_D, weights_K, experts_K in zip(x_TD, weights_TK, experts_TK, strict=True):
        whole_DD = torch.func.jacrev(layer)(x_D, experts, weight_ED, k)
        held = torch.func.jacrev(lambda x, w=weights_K, e=experts_K: mixed(x, experts, w, e))(x_D)
        router_DD = whole_DD - held
        shares.append(float(router_DD.square().sum() / whole_DD.square().sum()))
        ranks.append(int(torch.linalg.matrix_rank(router_DD, atol=1e-10)))
        mean_DD += router_DD.T @ router_DD / T
    assert found.share == pytest.approx(sum(shares) / T, abs=1e-12)
    assert found.rank == max(ranks) == k - 1
    assert found.effective_rank == pytest.approx(effective_rank(mean_DD) if k > 1 else 0.0, rel=1e-9)
    if k > 1:  # rows of J_R lie in the span of the router's matrix
        basis_DR = span(weight_ED)
        inside_DD = basis_DR @ basis_DR.T @ mean_DD
        assert torch.allclose(inside_DD, mean_DD, atol=1e-12)


def mixed(x_D: Tensor, experts: Experts, weights_K: Tensor, experts_K: Tensor) -> Tensor:
    """The layer with weights that do not depend on the token."""
    outputs = [experts.one(int(expert), x_D[None])[0] for expert in experts_K]
    return torch.stack([w * y for w, y in zip(weights_K, outputs, strict=True)]).sum(0)


def test_probes_estimate_the_size_of_a_wide_jacobian() -> None:
    size = 4 * jacobian.EXACT_UP_TO
    matrix_DD = drawn(size, size, seed=5)
    probes_DP = jacobian.probes(matrix_DD)
    assert probes_DP.shape == (size, jacobian.EXACT_UP_TO)
    estimate = (matrix_DD @ probes_DP).square().sum() / matrix_DD.square().sum()
    assert float(estimate) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("topk", {"pre_softmax": True}),
        ("topk", {"score_function": "sigmoid"}),
        ("xmoe", {}),
        ("hyper", {"hypernet_width": 8}),
        ("smoe_dropout", {"init_std": 0.5}),
    ],
)
def test_slopes_of_every_kind_of_weight_against_differences(name: str, options: dict[str, object]) -> None:
    router = build_router(name, hidden_size=D, num_experts=E, topk=2, **options).eval()
    x_TD = drawn(T, D, seed=6).float()
    slopes_TKD = jacobian.weight_slopes(lambda x: router(x).weights_TK, x_TD)
    step = 1e-2
    for d in range(D):
        moved = torch.zeros(D)
        moved[d] = step
        with torch.no_grad():
            up, down, here = (router(x_TD + sign * moved) for sign in (1, -1, 0))
        same_TK = (up.experts_TK == here.experts_TK) & (down.experts_TK == here.experts_TK)
        difference_TK = (up.weights_TK - down.weights_TK) / (2 * step)
        assert torch.allclose(slopes_TKD[..., d][same_TK], difference_TK[same_TK], atol=2e-4)
        assert same_TK.all(1).sum() >= T - 1


def test_drift() -> None:
    weight_ED = drawn(E, D, seed=7)
    mixed_EE = drawn(E, E, seed=8)
    assert drift(weight_ED, weight_ED) == pytest.approx(0.0, abs=1e-12)
    assert drift(mixed_EE @ weight_ED, weight_ED) == pytest.approx(0.0, abs=1e-12)  # the same span
    other_ED = torch.cat([weight_ED[:4], torch.linalg.svd(weight_ED)[2][E : E + 2]])  # two of six are new
    assert drift(other_ED, weight_ED) == pytest.approx(1 / 3)
    unrelated = [drift(drawn(4, 400, seed=2 * n), drawn(4, 400, seed=2 * n + 1)) for n in range(20)]
    assert sum(unrelated) / 20 == pytest.approx(1 - 4 / 400, abs=0.005)


def test_inputs_in_a_span() -> None:
    weight_ED = drawn(E, D, seed=9)
    assert inside_span(weight_ED, drawn(20_000, D, seed=10) + 3.0) == pytest.approx(E / D, abs=0.01)
    assert inside_span(weight_ED, drawn(50, E, seed=11) @ weight_ED) == pytest.approx(1.0)


def test_effective_rank() -> None:
    assert effective_rank(torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0]))) == pytest.approx(3.0)
    assert effective_rank(torch.diag(torch.tensor([0.9, 0.1]))) == pytest.approx(
        math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    )
    assert effective_rank(torch.zeros(3, 3)) == 0.0
