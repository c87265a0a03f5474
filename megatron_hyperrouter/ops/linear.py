"""A linear map in float32 of an input that is kept in its own dtype, and an identity map with a graph to
parameters that a pass does not use.

Legend: ``T`` tokens, ``D`` hidden size, ``E`` outputs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def float32_linear(x_TD: Tensor, W_ED: Tensor, b_E: Tensor | None = None) -> Tensor:
    """``x W^T + b`` in float32; for the backward pass it keeps ``x`` in its own dtype, not a float32 copy."""
    if x_TD.dtype == torch.float32:
        return F.linear(x_TD, W_ED, b_E)
    logits_TE: Tensor = _Float32Linear.apply(x_TD, W_ED, b_E)  # type: ignore[no-untyped-call]
    return logits_TE


def float32_maths(device: torch.device) -> AbstractContextManager[object]:
    """Keeps autocast from rounding the inputs of a matrix product."""
    if device.type == "meta":  # autocast refuses this device
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class _Float32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, W_ED: Tensor, b_E: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TD, W_ED)
        return F.linear(x_TD.float(), W_ED, b_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, W_ED = ctx.saved_tensors
        need_x, need_W, need_b = ctx.needs_input_grad
        return (
            (grad_TE @ W_ED).to(x_TD.dtype) if need_x else None,
            grad_TE.t() @ x_TD.float() if need_W else None,
            grad_TE.sum(0) if need_b else None,
        )


def reaching(value: Tensor, *parameters: Tensor) -> Tensor:
    """``value``, with a graph in which the backward pass gives ``parameters`` zero gradients.

    A method that does not use a parameter in some passes needs this: hosts that reduce gradients during
    the backward pass wait for the gradient of every parameter (megatron-core's overlap raises an error,
    param_and_grad_buffer.py:206).
    """
    reached: Tensor = _Reaching.apply(value, *parameters)  # type: ignore[no-untyped-call]
    return reached


class _Reaching(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters  # not saved tensors: hooks that offload activations would move them
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wanted = ctx.needs_input_grad[1:]
        return gradient, *(
            torch.zeros_like(each) if need else None
            for each, need in zip(ctx.parameters, wanted, strict=True)
        )
