"""Attention of a decoder with a key/value cache, grouped-query and latent.

Legend: ``B`` prompts, ``Q`` new positions, ``P`` positions so far, ``N`` query heads, ``G`` key/value heads,
``C`` channels of a head (of which ``R`` pairs turn), ``D`` hidden size, ``L`` rank of a latent vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.export.classes.names import ModelShape
from megatron_hyperrouter.model.attention.rotary import concentration, rates, temperature


@dataclass
class KeyValueCache:
    """Keys and values of the positions so far, ``[B, G, P, C]`` for each layer; ``hidden_BP``: padding in
    front of short prompts.
    """

    hidden_BP: Tensor
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Number of positions so far."""
        return self.length_of(0)

    def length_of(self, layer: int) -> int:
        """Positions that a layer has seen."""
        return self.keys[layer].size(2) if layer in self.keys else 0

    def extend(self, layer: int, key_BGQC: Tensor, value_BGQC: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values of new positions; returns all."""
        if layer in self.keys:
            key_BGQC = torch.cat((self.keys[layer], key_BGQC), 2)
            value_BGQC = torch.cat((self.values[layer], value_BGQC), 2)
        self.keys[layer], self.values[layer] = key_BGQC, value_BGQC
        return key_BGQC, value_BGQC

    def visible(self, layer: int, new: int, window: int | None) -> Tensor:
        """Which positions each of ``new`` ones attends to, ``[B, 1, Q, P + Q]``: itself and those before
        it, without padding; ``window``: only this many before it.
        """
        start = self.length_of(layer)
        batch, padded = self.hidden_BP.shape
        before_QP = torch.arange(start, start + new)[:, None] - torch.arange(start + new)
        seen_QP = before_QP >= 0 if window is None else (before_QP >= 0) & (before_QP <= window)
        hidden_BP = torch.zeros(batch, start + new, dtype=torch.bool)
        hidden_BP[:, :padded] = self.hidden_BP
        # padding sees itself, so that its row is not empty
        return ((seen_QP & ~hidden_BP[:, None]) | (before_QP == 0))[:, None]


class _Attention:
    """What both forms share: positions, norms and the scores."""

    def __init__(
        self,
        run: RunConfig,
        sizes: ModelShape,
        read: Callable[[str], Tensor],
        layer: str,
        number: int,
        window: int | None,
    ) -> None:
        self.run, self.sizes, self.number, self.window = run, sizes, number, window
        self.rates_R, self.stretch = rates(run), concentration(run)
        self.prefix, self.read = f"{layer}self_attention.", read
        self.out = self._own("linear_proj.weight")

    def _own(self, leaf: str) -> Tensor:
        return self.read(self.prefix + leaf)

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else F.rms_norm(x, weight.shape, weight, self.run.model.norm_epsilon)

    def _turned(self, x_BQHC: Tensor, places_BQ: Tensor) -> Tensor:
        """Rotary positions: channel i is rotated with channel i + R; channels from 2 R on are not rotated."""
        angles = places_BQ.clamp(min=0).float()[:, :, None, None] * self.rates_R
        cos, sin = angles.cos() * self.stretch, angles.sin() * self.stretch
        pairs = len(self.rates_R)
        first, second, still = x_BQHC.tensor_split([pairs, 2 * pairs], -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, still), -1)

    def _attended(
        self,
        query_BQNC: Tensor,
        key_BQGC: Tensor,
        value_BQGC: Tensor,
        cache: KeyValueCache,
        scale: float | None = None,
    ) -> Tensor:
        mask = cache.visible(self.number, query_BQNC.size(1), self.window)
        key, value = cache.extend(self.number, key_BQGC.transpose(1, 2), value_BQGC.transpose(1, 2))
        query = query_BQNC.transpose(1, 2)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=key.size(1) != query.size(1)
        )
        return F.linear(out.transpose(1, 2).flatten(2), self.out)


class GroupedAttention(_Attention):
    """Queries, and keys and values that a group of them shares."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.qkv = self._own("linear_qkv.weight")
        self.bias = self._own("linear_qkv.bias") if self.sizes.qkv_bias else None
        norms = ("q_layernorm.weight", "k_layernorm.weight")
        self.norms = [self._own(leaf) if self.sizes.qk_norm else None for leaf in norms]

    def compute(self, x_BQD: Tensor, places_BQ: Tensor, cache: KeyValueCache) -> Tensor:
        """The output ``_BQD``; the cache grows."""
        heads = self.sizes.heads
        per_group = heads.queries // heads.groups
        qkv = F.linear(x_BQD, self.qkv, self.bias)
        grouped = qkv.view(*qkv.shape[:2], heads.groups, per_group + 2, heads.channels)
        query, key, value = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
        query, key = (
            self._turned(self._norm(x, weight), places_BQ)
            for x, weight in zip((query, key), self.norms, strict=True)
        )
        return self._attended(query, key, value, cache)


class LatentAttention(_Attention):
    """Queries, keys and values from low-rank vectors (DeepSeek-V2, 2405.04434, section 2.1).

    The cache contains the keys and values of all heads, not the latent vectors.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        normed = self.sizes.qk_norm
        if self.sizes.low_rank_queries:
            self.query_down = self._own("linear_q_down_proj.weight")
            self.query_norm = self._own("q_layernorm.weight") if normed else None
            self.query = self._own("linear_q_up_proj.weight")
        else:
            self.query = self._own("linear_q_proj.weight")
        self.latent = self._own("linear_kv_down_proj.weight")
        self.latent_norm = self._own("kv_layernorm.weight") if normed else None
        self.pairs = self._own("linear_kv_up_proj.weight")
        attention = self.run.attention
        self.plain, self.turning = attention.qk_head_dim, attention.qk_pos_emb_head_dim
        sharpness = temperature(attention.rotary_scaling_factor, attention.mscale_all_dim)
        self.scale = sharpness * sharpness / math.sqrt(self.plain + self.turning)

    def compute(self, x_BQD: Tensor, places_BQ: Tensor, cache: KeyValueCache) -> Tensor:
        """The output ``_BQD``; the cache grows."""
        heads, plain, turning = self.sizes.heads.queries, self.plain, self.turning
        if self.sizes.low_rank_queries:
            x_BQL = self._norm(F.linear(x_BQD, self.query_down), self.query_norm)
            query = F.linear(x_BQL, self.query)
        else:
            query = F.linear(x_BQD, self.query)
        latent_BQL, key_BQR = F.linear(x_BQD, self.latent).tensor_split([-turning], -1)
        pairs = F.linear(self._norm(latent_BQL, self.latent_norm), self.pairs)
        key, value = pairs.view(*pairs.shape[:2], heads, -1).tensor_split([plain], -1)
        query, query_turning = query.view(*query.shape[:2], heads, -1).tensor_split([plain], -1)
        query_turning, key_turning = (
            self._turned(torch.cat((x[..., 0::2], x[..., 1::2]), -1), places_BQ)  # pairs are neighbours
            for x in (query_turning, key_BQR.unsqueeze(2))
        )
        key_turning = key_turning.expand(*key.shape[:3], turning)
        query, key = torch.cat((query, query_turning), -1), torch.cat((key, key_turning), -1)
        return self._attended(query, key, value, cache, self.scale)
