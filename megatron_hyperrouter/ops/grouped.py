"""SwiGLU experts as grouped matrix products: no padding, no loop over experts, no wait of the host.

Rows are gathered in both directions, never scattered with atomics, so sums have a fixed order on every
device.

Legend: ``T`` tokens, ``K`` choices of a token, ``R`` routes, ``E`` experts here, ``D`` hidden size, ``F``
width of an expert, ``G = 2 F`` for its two input matrices [gate; up].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ALIGNMENT = 16  # bytes: rows of the matrices of a grouped product must start at multiples of this


class RoutesByExpert(NamedTuple):
    """Routes in the order of their experts; everything stays on the device."""

    order_R: Tensor  # the route in each row
    row_R: Tensor  # the row of each route
    ends_E: Tensor  # int32: the row after each expert's last one


def sort_by_expert(experts_R: Tensor, num_experts: int) -> RoutesByExpert:
    """Sort the routes by expert; equal ids keep their order, so rows do not depend on the device.

    Ids from ``num_experts`` on go to the rows behind all experts' rows.
    """
    sorted_R, order_R = experts_R.sort(stable=True)
    numbers_R = torch.arange(experts_R.numel(), device=experts_R.device)
    row_R = torch.empty_like(order_R).scatter_(0, order_R, numbers_R)
    experts_E = torch.arange(num_experts, device=experts_R.device, dtype=experts_R.dtype)
    return RoutesByExpert(order_R, row_R, torch.searchsorted(sorted_R, experts_E, right=True, out_int32=True))


def spread(x_TD: Tensor, order_R: Tensor, row_R: Tensor, choices: int) -> Tensor:
    """The rows ``_RD``, each the vector of its route's token; token t has routes ``t * choices`` and on."""
    rows: Tensor = _Spread.apply(x_TD, order_R, row_R, choices)  # type: ignore[no-untyped-call]
    return rows


def collect(y_RD: Tensor, order_R: Tensor, row_R: Tensor, choices: int) -> Tensor:
    """``_TD``: the sum of each token's rows, in the order of its choices."""
    total: Tensor = _Collect.apply(y_RD, order_R, row_R, choices)  # type: ignore[no-untyped-call]
    return total


def experts(
    x_RD: Tensor, w1_EGD: Tensor, w2_EDF: Tensor, ends_E: Tensor, weights_R: Tensor | None = None
) -> Tensor:
    """Apply to each row its expert, ``W2 (weight * silu(gate) * up)``.  The rows of an expert are
    contiguous.

    Weights scale the hidden units, which scales the output, so outputs need not be kept for the gradient
    of the weights.
    """
    y_RD: Tensor = _Experts.apply(x_RD, w1_EGD, w2_EDF, weights_R, ends_E)  # type: ignore[no-untyped-call]
    return y_RD


class _Spread(torch.autograd.Function):
    """Backward: a token's rows are gathered and added."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, row_R: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(row_R)
        ctx.choices = choices
        return x_TD.index_select(0, order_R // choices if choices > 1 else order_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        (row_R,) = ctx.saved_tensors
        return _summed(grad_RD, row_R, ctx.choices), None, None, None


class _Collect(torch.autograd.Function):
    """Backward: one gather."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, order_R: Tensor, row_R: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(order_R)
        ctx.choices = choices
        return _summed(y_RD, row_R, choices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        (order_R,) = ctx.saved_tensors
        tokens_R = order_R // ctx.choices if ctx.choices > 1 else order_R
        return grad_TD.index_select(0, tokens_R), None, None, None


def _summed(y_RD: Tensor, row_R: Tensor, choices: int) -> Tensor:
    """One choice after the other, added in float32: ``[T, K, D]`` never exists."""
    if choices == 1:
        return y_RD.index_select(0, row_R)
    if y_RD.dtype == torch.float32:  # one operator; in bfloat16 it would round after each choice
        starts_T = torch.arange(0, row_R.numel(), choices, device=row_R.device)
        return torch.embedding_bag(y_RD.detach(), row_R, starts_T, mode=0)[0]
    rows_KT = row_R.view(-1, choices).t()
    total_TD = y_RD.index_select(0, rows_KT[0]).float()
    for rows_T in rows_KT[1:]:
        total_TD += y_RD.index_select(0, rows_T)
    return total_TD.to(y_RD.dtype)


class _Experts(torch.autograd.Function):
    """Keeps the input rows and their products with both input matrices; computes the hidden units again in
    the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, w1_EGD: Tensor, w2_EDF: Tensor, weights_R: Tensor | None, ends_E: Tensor
    ) -> Tensor:
        both_RG = F.grouped_mm(x_RD, w1_EGD.mT, offs=ends_E)
        gate_RF, up_RF = both_RG.chunk(2, -1)
        hidden_RF = F.silu(gate_RF).mul_(up_RF)
        if weights_R is not None:
            hidden_RF.mul_(weights_R.unsqueeze(1))  # a product in float32 for any dtype of the rows
        ctx.save_for_backward(x_RD, w1_EGD, w2_EDF, weights_R, ends_E, both_RG)
        return F.grouped_mm(hidden_RF, w2_EDF.mT, offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, w1_EGD, w2_EDF, weights_R, ends_E, both_RG = ctx.saved_tensors
        need_x, need_w1, need_w2, need_weights, _ = ctx.needs_input_grad
        grad_RD = _dense(grad_RD)
        gate_RF, up_RF = both_RG.chunk(2, -1)
        silu_RF = F.silu(gate_RF)
        hidden_RF = silu_RF * up_RF  # without the weights
        back_RF = F.grouped_mm(grad_RD, w2_EDF, offs=ends_E)
        grad_weights_R = None
        if weights_R is not None:
            if need_weights:
                grad_weights_R = (back_RF * hidden_RF).sum(1, dtype=weights_R.dtype)
            back_RF.mul_(weights_R.unsqueeze(1))
            hidden_RF.mul_(weights_R.unsqueeze(1))
        grad_w2_EDF = _by_expert(grad_RD, hidden_RF, ends_E) if need_w2 else None
        back_RG = torch.empty_like(both_RG)
        torch.mul(back_RF, silu_RF, out=back_RG[:, back_RF.size(1) :])
        torch.ops.aten.silu_backward.grad_input(
            back_RF.mul_(up_RF), gate_RF, grad_input=back_RG[:, : back_RF.size(1)]
        )
        grad_x_RD = F.grouped_mm(back_RG, w1_EGD, offs=ends_E) if need_x else None
        grad_w1_EGD = _by_expert(back_RG, x_RD, ends_E) if need_w1 else None
        return grad_x_RD, grad_w1_EGD, grad_w2_EDF, grad_weights_R, None


def _dense(grad_RD: Tensor) -> Tensor:
    """A copy without strides of 0: an expanded gradient has them, and the product refuses them."""
    return grad_RD.contiguous() if grad_RD.numel() else grad_RD.new_empty(grad_RD.shape)


def _by_expert(left_RA: Tensor, right_RB: Tensor, ends_E: Tensor) -> Tensor:
    """``left^T right`` over the rows of each expert, ``[E, A, B]``; 0 for an expert without rows."""
    product_EAB = F.grouped_mm(left_RA.mT, right_RB, offs=ends_E)
    # on Blackwell an expert without rows gets uninitialised memory (pytorch issue 172439)
    if product_EAB.is_cuda:
        load_E = ends_E.diff(prepend=ends_E.new_zeros(1))
        product_EAB = torch.where(load_E.view(-1, 1, 1) > 0, product_EAB, 0.0)
    return product_EAB
