"""Attention through torch's ``scaled_dot_product_attention``, for machines without Transformer Engine.

Legend: ``S`` sequence, ``B`` batch, ``N`` query heads and ``G`` key/value heads on this rank, ``C`` channels
of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_hyperrouter.model.attention.documents import same_document, turned_back

# of a layer's next micro-batch: where the document of each token of the whole sequence begins, _BS
NextStarts = Callable[[], Tensor]


class ScaledDotProductAttention(MegatronModule):
    """megatron-core's core-attention slot: causal, grouped-query, without storing the score matrix where
    torch can avoid it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        *,
        recompute: bool = False,
        starts: Callable[[], NextStarts] | None = None,
        rates_R: Tensor | None = None,
        window: int | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        """``recompute``: selective activation checkpointing; only attention is computed again in the
        backward pass.

        ``starts`` makes an object that tells this layer where documents begin; attention then stays within
        documents. With ``rates_R``, the rates of the rotary positions, attention crosses documents, and
        only positions restart at each document.  Within one document both are the same, because rotary
        attention depends only on differences of positions.

        ``window``: a token attends to itself and to this many tokens before it; None: to all of them.
        ``softmax_scale`` multiplies the scores; None: 1 / sqrt(channels).

        Under context parallelism, keys and values are gathered; each rank attends from its queries to all
        of them.
        """
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal:
            raise NotImplementedError(
                f"attention mask {attn_mask_type} is not supported; use AttnMaskType.causal"
            )
        self.recompute = recompute
        self.cp_group = getattr(pg_collection, "cp", None)
        self.next_starts = None if starts is None else starts()
        self.rates_R, self.window, self.softmax_scale = rates_R, window, softmax_scale
        self.stopwatch: AbstractContextManager[None] = nullcontext()  # around what contains no communication

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
            raise NotImplementedError("attention masks, biases and packed sequences are not supported")
        # Called here, because recomputing the attention must use the same micro-batch.
        inputs = (query_SBNC, key_SBGC, value_SBGC, None if self.next_starts is None else self.next_starts())
        if self.recompute and self.training and torch.is_grad_enabled():
            result: Tensor = checkpoint(self._attend, *inputs, use_reentrant=False)
            return result
        return self._attend(*inputs)

    def _attend(
        self, query_SBNC: Tensor, key_SBGC: Tensor, value_SBGC: Tensor, starts_BS: Tensor | None
    ) -> Tensor:
        length, device = query_SBNC.size(0), query_SBNC.device
        rank, size = (0, 1) if self.cp_group is None else (self.cp_group.rank(), self.cp_group.size())
        masked = size > 1 or (self.window is not None and self.window + 1 < size * length)
        mask = visible(length, rank, size, device, self.window) if masked else None
        if starts_BS is not None:
            keys = gathered_positions(length, size, device)
            own = keys[rank * length : (rank + 1) * length]
            if self.rates_R is None:
                inside = same_document(starts_BS, own, keys)
                mask = inside & visible(length, rank, size, device, self.window)
            else:
                starts_SB = starts_BS[:, own].t()
                query_SBNC, key_SBGC = (
                    turned_back(x, starts_SB, self.rates_R) for x in (query_SBNC, key_SBGC)
                )
        if size > 1:
            key_SBGC, value_SBGC = (
                gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group)
                for x in (key_SBGC, value_SBGC)
            )
        # [B, heads, S, C]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBNC, key_SBGC, value_SBGC))
        if query.is_cuda and (mask is not None or query.dtype == torch.float32):
            # torch's flash kernel supports neither masks nor float32, and its memory-efficient kernel
            # supports no groups of heads. Without either, torch uses a kernel that stores all scores.
            key, value = (one_for_each_head(x, query.size(1)) for x in (key, value))
        with self.stopwatch:
            out = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=self.config.attention_dropout if self.training else 0.0,
                is_causal=mask is None,
                scale=self.softmax_scale,
                enable_gqa=key.size(1) != query.size(1),
            )
        return out.permute(2, 0, 1, 3).flatten(2)


def one_for_each_head(x_BGSC: Tensor, heads: int) -> Tensor:
    """Keys or values, those of a group repeated for each of its query heads: ``_BNSC``."""
    return x_BGSC.repeat_interleave(heads // x_BGSC.size(1), 1)


def visible(length: int, rank: int, size: int, device: torch.device, window: int | None = None) -> Tensor:
    """True if a query of context-parallel rank ``rank`` may attend to a gathered key: ``[length, size *
    length]``. ``window``: number of earlier tokens that a token attends to; None: all.
    """
    keys = gathered_positions(length, size, device)
    before = keys[rank * length : (rank + 1) * length, None] - keys[None, :]
    return before >= 0 if window is None else (before >= 0) & (before <= window)


def gathered_positions(length: int, size: int, device: torch.device) -> Tensor:
    """Positions in the sequence of keys that were gathered from ``size`` context-parallel ranks: ``[size *
    length]``.

    Each rank has ``length`` positions: a slice from either end of the sequence, so that all have equal work.
    """
    if size == 1:
        return torch.arange(length, device=device)
    half = length // 2
    inside = torch.arange(half, device=device)
    return torch.cat([inside + half * part for rank in range(size) for part in (rank, 2 * size - 1 - rank)])
