"""Angles of the rotary position embedding (RoFormer, 2104.09864, eq. 34), in the form that megatron-core's
attention takes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryTable(nn.Module):
    """Angles ``[S, 1, 1, C]``, float32: position times rate, the C / 2 rates twice.

    megatron-core's ``RotaryEmbedding`` asks for the CUDA device whenever its rates lie on the CPU
    (rotary_pos_embedding.py:162).
    """

    def __init__(self, channels: int, base: float) -> None:
        super().__init__()
        self.channels, self.base = channels, base
        self._table: Tensor | None = (
            None  # for the longest sequence so far; no buffer: a cast to bfloat16 must not reach it
        )

    def forward(self, length: int, device: torch.device) -> Tensor:
        """Angles of the positions 0 to ``length - 1``."""
        if self._table is None or self._table.size(0) < length or self._table.device != device:
            rates = self.base ** (
                -torch.arange(0, self.channels, 2, dtype=torch.float32, device=device) / self.channels
            )
            angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), rates)
            self._table = torch.cat([angles, angles], dim=-1).view(length, 1, 1, self.channels)
        return self._table[:length]
