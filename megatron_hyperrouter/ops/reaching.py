"""A zero gradient for parameters that a pass does not use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
