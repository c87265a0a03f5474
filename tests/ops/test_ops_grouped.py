"""Grouped experts against a loop over tokens in float64.

Legend: ``T`` tokens, ``K`` choices, ``E`` experts, ``D`` hidden size, ``F`` width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_hyperrouter.ops.grouped import collect, experts, sort_by_expert, spread

T, D, F = 67, 16, 24
# float32 and bfloat16: largest difference from float64 over the largest number
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2}


def made(k: int, num_experts: int, skew: float, dtype: torch.dtype) -> list[Tensor]:
    """``x, weights, experts, w1, w2``; ``skew`` sends more tokens to the later experts."""
    generator = torch.Generator().manual_seed(k)
    x_TD = torch.randn(T, D, generator=generator).to(dtype)
    logits_TE = torch.randn(T, num_experts, generator=generator) + skew * torch.linspace(0, 1, num_experts)
    logits_TK, experts_TK = logits_TE.topk(k, -1)
    w1 = (torch.randn(num_experts, 2 * F, D, generator=generator) * D**-0.5).to(dtype)
    w2 = (torch.randn(num_experts, D, F, generator=generator) * F**-0.5).to(dtype)
    return [x_TD, logits_TK.softmax(-1), experts_TK, w1, w2]


def grouped(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    rows = sort_by_expert(experts_TK.flatten(), w1.size(0))
    k = experts_TK.size(1)
    x_RD = spread(x_TD, rows.order_R, rows.row_R, k)
    y_RD = experts(x_RD, w1, w2, rows.ends_E, weights_TK.flatten()[rows.order_R])
    return collect(y_RD, rows.order_R, rows.row_R, k)


def by_loop(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    outputs = []
    for x_D, weights_K, experts_K in zip(x_TD, weights_TK, experts_TK.tolist(), strict=True):
        total_D = torch.zeros_like(x_D)
        for weight, expert in zip(weights_K, experts_K, strict=True):
            gate_F, up_F = (w1[expert] @ x_D).chunk(2)
            total_D = total_D + weight * (w2[expert] @ (gate_F * gate_F.sigmoid() * up_F))
        outputs.append(total_D)
    return torch.stack(outputs)


def gradients(layer: object, args: list[Tensor]) -> list[Tensor]:
    """Output and gradients, under a loss that gives each output number another gradient."""
    args = [arg.detach().clone().requires_grad_(arg.is_floating_point()) for arg in args]
    output = layer(*args)  # type: ignore[operator]
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    return [output.detach(), *(arg.grad for arg in args if arg.grad is not None)]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("k", "num_experts", "skew"), [(1, 4, 0.0), (2, 8, 0.0), (4, 4, 0.0), (3, 16, 9.0)])
def test_are_a_loop_over_tokens(k: int, num_experts: int, skew: float, dtype: torch.dtype) -> None:
    args = made(k, num_experts, skew, dtype)
    if skew:
        assert len(args[2].unique()) < num_experts  # some experts have no token
    ours = gradients(grouped, args)
    wanted = gradients(by_loop, [arg.double() if arg.is_floating_point() else arg for arg in args])
    assert len(ours) == len(wanted) == 5
    for name, one, other in zip(("output", "x", "weights", "w1", "w2"), ours, wanted, strict=True):
        assert (one - other).abs().max() <= TOLERANCE[dtype] * other.abs().max(), name
    assert all(map(torch.equal, ours, gradients(grouped, args)))  # and repeatable


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    args = made(1, 4, 0.0, torch.float32)
    args[2].fill_(2)
    *_, w1, w2 = gradients(grouped, args)
    for gradient in (w1, w2):
        assert gradient[2].any() and not gradient[[0, 1, 3]].any()


def test_routes_of_no_expert_lie_behind_all_others() -> None:
    rows = sort_by_expert(torch.tensor([2, 0, 1, 2, 0]), 2)
    assert rows.order_R.tolist() == [1, 4, 2, 0, 3]
    assert rows.row_R.tolist() == [3, 0, 2, 4, 1]
    assert rows.ends_E.tolist() == [2, 3]


def test_no_rows_at_all() -> None:
    _, _, _, w1, w2 = made(1, 4, 0.0, torch.float32)
    x_RD = torch.zeros(0, D, requires_grad=True)
    y_RD = experts(x_RD, w1.requires_grad_(), w2, torch.zeros(4, dtype=torch.int32), torch.zeros(0))
    assert y_RD.shape == (0, D)
    y_RD.sum().backward()
    assert w1.grad is not None and not w1.grad.any()


def test_an_expanded_gradient_and_frozen_experts() -> None:
    """``sum()`` hands back a gradient whose strides are 0; frozen matrices get none."""
    x_TD, weights_TK, experts_TK, w1, w2 = made(2, 4, 0.0, torch.float32)
    x_TD.requires_grad_()
    rows = sort_by_expert(experts_TK.flatten(), 4)
    experts(spread(x_TD, rows.order_R, rows.row_R, 2), w1, w2, rows.ends_E).sum().backward()
    expected = torch.autograd.grad(by_loop(x_TD, torch.ones_like(weights_TK), experts_TK, w1, w2).sum(), x_TD)
    torch.testing.assert_close(x_TD.grad, expected[0], rtol=1e-4, atol=1e-5)
