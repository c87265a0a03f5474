"""Rotary positions in few operators, for latent attention and the patch of megatron-core that applies them.

Legend: ``S`` sequence, ``B`` batch, ``N`` heads, ``C`` channels that turn, ``R = C / 2``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def turned_by_table(x_SBNC: Tensor, angles_S11C: Tensor, scale: float = 1.0) -> Tensor:
    """Rotate the pairs of channels (i, i + C/2), in three operators in each pass; the table of angles keeps
    its cosines and sines.
    """
    found: dict[Any, tuple[Tensor, Tensor]] = getattr(angles_S11C, "_hyperrouter_turns", {})
    key = (scale, x_SBNC.dtype)
    if key not in found:
        with torch.inference_mode(False), torch.no_grad():  # training may follow an evaluation
            cos, sin = ((part * scale).to(x_SBNC.dtype) for part in (angles_S11C.cos(), angles_S11C.sin()))
            found[key] = cos, sin[..., : sin.size(-1) // 2].contiguous()
        setattr(angles_S11C, "_hyperrouter_turns", found)  # noqa: B010 - a note of ours on a host's tensor
    y_SBNC: Tensor = _Rotate.apply(x_SBNC, *found[key])  # type: ignore[no-untyped-call]
    return y_SBNC


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBNC: Tensor, cos_S11C: Tensor, sin_S11R: Tensor) -> Tensor:
        ctx.save_for_backward(cos_S11C, sin_S11R)
        return _turn(x_SBNC, cos_S11C, sin_S11R, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SBNC: Tensor) -> tuple[Tensor | None, ...]:
        cos_S11C, sin_S11R = ctx.saved_tensors
        return _turn(grad_SBNC, cos_S11C, sin_S11R, -1), None, None


def _turn(x_SBNC: Tensor, cos_S11C: Tensor, sin_S11R: Tensor, direction: int) -> Tensor:
    first, second = x_SBNC.chunk(2, -1)
    y_SBNC = x_SBNC * cos_S11C
    half = first.size(-1)
    y_SBNC[..., :half].addcmul_(second, sin_S11R, value=-direction)
    y_SBNC[..., half:].addcmul_(first, sin_S11R, value=direction)
    return y_SBNC
