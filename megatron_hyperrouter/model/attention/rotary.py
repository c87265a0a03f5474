"""Rotary position embeddings (RoFormer, 2104.09864, eq. 34) and their scaling to longer contexts, in the form
that megatron-core's attention takes.

Legend: ``S`` sequence, ``B`` batch, ``N`` heads, ``C`` channels that turn, ``R = C / 2`` rates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron_hyperrouter.config.derived import rope_type, rotary_channels
from megatron_hyperrouter.config.tree import RunConfig

# Llama 3.1's constants, which megatron-core has as well (rotary_pos_embedding.py:81).
_LLAMA3_CONTEXT, _LLAMA3_SLOW, _LLAMA3_FAST = 8192, 1.0, 4.0


class RotaryTable(nn.Module):
    """Angles ``[S, 1, 1, C]``, float32: position times rate; the list of rates is repeated.

    megatron-core's ``RotaryEmbedding`` uses the CUDA device whenever its rates are on the CPU
    (rotary_pos_embedding.py:162).
    """

    def __init__(self, rates_R: Tensor) -> None:
        super().__init__()
        # Neither is a buffer: a cast to bfloat16 must not reach them.
        self._rates_R = rates_R
        self._table: Tensor | None = None  # for the longest sequence so far
        self._cut: Tensor | None = None  # the part of it that was asked for last

    def forward(self, length: int, device: torch.device) -> Tensor:
        """Angles of the positions 0 to ``length - 1``."""
        if self._table is None or self._table.size(0) < length or self._table.device != device:
            positions_S = torch.arange(length, dtype=torch.float32, device=device)
            angles_SR = torch.outer(positions_S, self._rates_R.to(device))
            self._table = torch.cat([angles_SR, angles_SR], dim=-1).view(length, 1, 1, -1)
            self._cut = None
        if self._cut is None or self._cut.size(0) != length:
            self._cut = self._table[:length]  # one tensor for all steps: a turn keeps its cosines
        return self._cut


def rates(config: RunConfig) -> Tensor:
    """Radians that a pair of channels turns from one position to the next: float32 ``_R``."""
    attention, channels, base = config.attention, rotary_channels(config), config.model.rotary_base
    plain_R = 1.0 / base ** (torch.arange(0, channels, 2, dtype=torch.float32, device="cpu") / channels)
    if attention.use_rope_scaling:
        return _llama3(plain_R, attention.rope_scaling_factor)
    if rope_type(config) == "yarn":
        return _yarn(plain_R, config)
    return plain_R / (attention.rotary_seq_len_interpolation_factor or 1.0)


def concentration(config: RunConfig) -> float:
    """YaRN (2309.00071, section 3.4): turned queries and keys are this much longer; 1 without YaRN."""
    attention = config.attention
    if rope_type(config) != "yarn":
        return 1.0
    factor = attention.rotary_scaling_factor
    return temperature(factor, attention.mscale) / temperature(factor, attention.mscale_all_dim)


def temperature(factor: float, strength: float) -> float:
    """``0.1 strength ln(factor) + 1``: the square root of what scores are multiplied by (section 3.4)."""
    return 0.1 * strength * math.log(factor) + 1.0


def _llama3(plain_R: Tensor, factor: float) -> Tensor:
    """Slow turns are divided by ``factor``, fast ones stay, and those between are blended."""
    turns_R = _LLAMA3_CONTEXT * plain_R / (2 * math.pi)  # in the original context
    share_R = ((turns_R - _LLAMA3_SLOW) / (_LLAMA3_FAST - _LLAMA3_SLOW)).clamp(0.0, 1.0)
    return plain_R * share_R + plain_R / factor * (1.0 - share_R)


def _yarn(plain_R: Tensor, config: RunConfig) -> Tensor:
    """YaRN (2309.00071, section 3.2): as Llama 3's scaling, with a ramp over the channels' numbers."""
    attention, count = config.attention, plain_R.numel()
    fast, slow = (
        _channel_that_turns(turns, 2 * count, config) for turns in (attention.beta_fast, attention.beta_slow)
    )
    low, high = max(math.floor(fast), 0), min(math.ceil(slow), 2 * count - 1)
    width = high - low or 0.001
    scaled_R = ((torch.arange(count, dtype=torch.float32, device="cpu") - low) / width).clamp(0.0, 1.0)
    return plain_R / attention.rotary_scaling_factor * scaled_R + plain_R * (1.0 - scaled_R)


def _channel_that_turns(turns: float, channels: int, config: RunConfig) -> float:
    """Number of the pair of channels that turns so often in the original context."""
    context, base = config.attention.original_max_position_embeddings, config.model.rotary_base
    return channels * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))
