"""Attention through torch's ``scaled_dot_product_attention``, for machines without Transformer Engine.

Legend: ``S`` sequence, ``B`` batch, ``N`` query heads and ``G`` key/value heads on this rank, ``C`` channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class ScaledDotProductAttention(MegatronModule):
    """megatron-core's core-attention slot: causal, grouped-query, never materialises the score matrix where torch can avoid it."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        *,
        recompute: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        """``recompute``: selective activation checkpointing, attention alone is computed again in the backward pass.

        Under context parallelism keys and values are gathered: each rank then attends from its own queries to all of them.
        """
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal:
            raise NotImplementedError(f"attention mask {attn_mask_type}: only causal attention is provided")
        self.recompute = recompute
        self.cp_group = getattr(pg_collection, "cp", None)

    def forward(
        self,
        query_SBNC: Tensor,
        key_SBGC: Tensor,
        value_SBGC: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> Tensor:
        """Returns ``[S, B, N * C]``."""
        if attention_mask is not None or attention_bias is not None or packed_seq_params is not None:
            raise NotImplementedError("attention masks, biases and packed sequences are not provided")
        inputs = (query_SBNC, key_SBGC, value_SBGC)
        if self.recompute and self.training and torch.is_grad_enabled():
            result: Tensor = checkpoint(self._attend, *inputs, use_reentrant=False)
            return result
        return self._attend(*inputs)

    def _attend(self, query_SBNC: Tensor, key_SBGC: Tensor, value_SBGC: Tensor) -> Tensor:
        mask = None
        if self.cp_group is not None and self.cp_group.size() > 1:
            mask = visible(query_SBNC.size(0), self.cp_group.rank(), self.cp_group.size(), query_SBNC.device)
            key_SBGC, value_SBGC = (
                gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group) for x in (key_SBGC, value_SBGC)
            )
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBNC, key_SBGC, value_SBGC))  # [B, heads, S, C]
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.config.attention_dropout if self.training else 0.0,
            is_causal=mask is None,
            enable_gqa=key.size(1) != query.size(1),
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def visible(length: int, rank: int, size: int, device: torch.device) -> Tensor:
    """True where a query of context-parallel rank ``rank`` may look at a gathered key: ``[length, size * length]``.

    Each of ``size`` ranks has ``length`` positions: a slice from either end of the sequence, so that all have equal work.
    """
    half = length // 2
    inside = torch.arange(half, device=device)
    places = [torch.cat([inside + half * part, inside + half * (2 * size - 1 - part)]) for part in range(size)]
    return places[rank][:, None] >= torch.cat(places)[None, :]
