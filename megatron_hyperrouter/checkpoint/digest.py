"""Digests of tensors that add up: the sum of the digests of the parts is the digest of the whole, on any
layout.

``digest = sum over elements of (bits + 1) x odd(position in the whole tensor)  modulo 2**64``.
Multiplication by an odd factor can be inverted, so one changed element always changes the sum; the
position reveals swapped elements.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from megatron_hyperrouter.checkpoint.boxes import Box, Shape

MASK = (1 << 64) - 1
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # 2**64 / golden ratio, as a signed number
_CHUNK = 1 << 16  # elements at a time: three int64 copies of them stay in a core's cache
_CHUNK_GPU = 1 << 24  # few launches, and 400 MB of copies
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(values: Tensor, box: Box, whole: Shape) -> int:
    """Digest of the part ``box`` of a tensor of shape ``whole``; ``values`` has the box's numbers in
    row-major order.
    """
    return int(unread_digest(values, box, whole)) & MASK


def unread_digest(values: Tensor, box: Box, whole: Shape) -> Tensor:
    """The same as an int64 scalar on the tensor's device, so that many digests need one read."""
    flat = values.detach().reshape(-1)
    bits = flat.view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    chunk = _CHUNK_GPU if flat.is_cuda else _CHUNK
    for begin in range(0, len(bits), chunk):
        end = min(begin + chunk, len(bits))
        odd = _positions(begin, end, box, whole, flat.device).mul_(_FACTOR).bitwise_or_(1)
        total += odd.mul_(bits[begin:end].to(torch.int64) + 1).sum()
    return total


def _positions(begin: int, end: int, box: Box, whole: Shape, device: torch.device) -> Tensor:
    """Row-major places in the whole tensor of the box's numbers ``begin`` to before ``end``."""
    rest = torch.arange(begin, end, dtype=torch.int64, device=device)
    if box.size[1:] == whole[1:]:  # whole rows: their places follow each other
        return rest.add_(box.offset[0] * prod(whole[1:]) if whole else 0)
    place = torch.zeros_like(rest)
    for axis in reversed(range(len(whole))):
        index = rest.remainder(box.size[axis]) if axis else rest
        place.add_(index.add(box.offset[axis]).mul_(prod(whole[axis + 1 :])))
        rest = rest.div(box.size[axis], rounding_mode="floor")
    return place


def signed(value: int) -> int:
    """The number as a signed 64-bit integer."""
    value &= MASK
    return value - (1 << 64) if value >> 63 else value
