"""Attention through torch's ``scaled_dot_product_attention``, for machines without Transformer Engine.

Legend: ``S`` sequence, ``B`` batch, ``N`` query heads and ``G`` key/value heads on this rank, ``C`` channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class ScaledDotProductAttention(MegatronModule):
    """megatron-core's core-attention slot: causal, grouped-query, never materialises the score matrix where torch can avoid it."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, *, recompute: bool = False, **_: object
    ) -> None:
        """``recompute``: selective activation checkpointing, attention alone is computed again in the backward pass."""
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal:
            raise NotImplementedError(f"attention mask {attn_mask_type}: only causal attention is provided")
        self.recompute = recompute

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
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBNC, key_SBGC, value_SBGC))  # [B, heads, S, C]
        dropout = self.config.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, enable_gqa=key.size(1) != query.size(1))
        return out.permute(2, 0, 1, 3).flatten(2)
