"""Multiplicative noise that is the same on every layout: a function of (seed, step, layer, position of the
token, feature).

Legend: ``T`` tokens, ``D`` features, ``W`` 64-bit words for a token, four features each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hyperrouter.ops import keyed

_FEATURES = 4  # 16 bits each: as fine as the input itself in bfloat16, at a quarter of the words


def jitter(places_T: Tensor, num_features: int, eps: float, *, seed: int, step: int, layer: int) -> Tensor:
    """Float32 factors ``_TD``, uniform over 2^16 evenly spaced values in [1 - eps, 1 + eps].  They take
    about 2 ns each on a CPU core.

    Feature d of the token at position p uses bits 16 (d mod 4) and up of word ``p * W + d // 4`` of its
    stream.
    """
    words = -(-num_features // _FEATURES)
    counters_TW = places_T[:, None] * words + torch.arange(words, device=places_T.device)
    bits_TW = keyed.bits(counters_TW, seed=seed, name=f"jitter.{layer}.{step}")
    number_TD = bits_TW.view(torch.int16)[:, :num_features]
    return number_TD.float().add_(0.5).mul_(eps * 2.0**-15).add_(1.0)
