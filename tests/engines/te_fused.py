"""The stand-in for the fused kernels of Transformer Engine and apex, computed in another way than
megatron-core's own operators.  ``CALLED`` counts their calls.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

CALLED: Counter[str] = Counter()


def counted(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Notes each call of ``kernel`` in ``CALLED``."""

    def called(*args: Any, **kwargs: Any) -> Any:
        CALLED[kernel.__name__] += 1
        return kernel(*args, **kwargs)

    called.__name__ = kernel.__name__
    return called


@counted
def moe_permute(inp: Tensor, routing_map: Tensor, num_out_tokens: int = -1) -> tuple[Tensor, Tensor]:
    """A row for each route, those of an expert together; and the token of each row."""
    _, tokens_R = routing_map.t().nonzero(as_tuple=True)
    # The kernel allocates this many rows and fills as many as there are routes.
    assert len(tokens_R) == int(num_out_tokens)
    return inp[tokens_R], tokens_R


@counted
def moe_permute_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    experts_R, tokens_R = routing_map.t().nonzero(as_tuple=True)
    assert len(tokens_R) == int(num_out_tokens)
    return inp[tokens_R], probs[tokens_R, experts_R], tokens_R


@counted
def moe_unpermute(
    inp: Tensor, row_id_map: Tensor, merging_probs: Tensor | None = None, restore_shape: Any = None
) -> Tensor:
    assert merging_probs is None  # the experts have applied them
    return inp.new_zeros(restore_shape).index_add(0, row_id_map, inp)


@counted
def moe_sort_chunks_by_index(inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
    chunks = inp.split(split_sizes.tolist())
    return torch.cat([chunks[number] for number in sorted_index.tolist()])


@counted
def moe_sort_chunks_by_index_with_probs(
    inp: Tensor, probs: Tensor, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor, Tensor]:
    return tuple(moe_sort_chunks_by_index(rows, split_sizes, sorted_index) for rows in (inp, probs))  # type: ignore[return-value]


@counted
def apply_rotary_pos_emb(t: Tensor, freqs: Tensor, *, tensor_format: str, fused: bool) -> Tensor:
    """Pairs of channels as complex numbers, turned."""
    assert tensor_format == "sbhd" and fused
    turning, still = t.tensor_split([freqs.size(-1)], -1)
    first, second = turning.float().chunk(2, -1)
    turned = torch.complex(first, second) * torch.exp(1j * freqs.chunk(2, -1)[0])
    return torch.cat([turned.real.to(t.dtype), turned.imag.to(t.dtype), still], -1)


class _IntoMainGrad(torch.autograd.Function):
    """``x W^T`` whose weight gradient is added to the buffer of the optimizer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, multiplied: Tensor, weight: nn.Parameter) -> Tensor:
        ctx.save_for_backward(x, multiplied)
        ctx.weight = weight
        return x @ multiplied.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        x, multiplied = ctx.saved_tensors
        CALLED["wgrad accumulated"] += 1
        wgrad_gemm_accum_fp32(x.flatten(0, -2), grad.flatten(0, -2), ctx.weight.main_grad)
        ctx.weight.grad_added_to_main_grad = True
        # as in the original, a gradient of no meaning, for the hooks
        return grad @ multiplied, None, torch.full_like(ctx.weight, math.nan)


def product(x: Tensor, multiplied: Tensor, weight: nn.Parameter, *, into_main_grad: bool) -> Tensor:
    """``x W^T``; ``multiplied``: the weight as it is, or rounded to fewer bits."""
    if into_main_grad and torch.is_grad_enabled():
        result: Tensor = _IntoMainGrad.apply(x, multiplied.detach(), weight)  # type: ignore[no-untyped-call]
        return result
    return x @ multiplied.t()


def wgrad_gemm_accum_fp32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """apex's kernel."""
    assert main_grad.dtype == torch.float32
    main_grad.addmm_(grad_output.float().t(), inputs.float())


def apex() -> ModuleType:
    """The part of apex that megatron-core's layers ask for."""
    module = ModuleType("fused_weight_gradient_mlp_cuda")
    module.wgrad_gemm_accum_fp32 = wgrad_gemm_accum_fp32  # type: ignore[attr-defined]
    return module
