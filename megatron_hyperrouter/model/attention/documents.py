"""Where documents begin in a sample, and the consequences for attention and positions.

The tokenizer's end-of-document id is the last token of a document; Megatron-LM's
``_get_ltor_masks_and_position_ids`` (megatron-core 0.16, datasets/gpt_dataset.py) has the same boundaries.

Legend: ``B`` batch, ``S`` sequence, ``Q`` queries on this rank, ``N`` heads, ``C`` channels of a head,
``R`` rates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def document_starts(tokens_BS: Tensor, eod: int) -> Tensor:
    """For each token the position at which its document begins in the sample, 0 for one that began
    earlier: int64 ``_BS``.
    """
    length = tokens_BS.size(1)
    after_S = torch.arange(1, length + 1, device=tokens_BS.device)
    begins_BS = torch.where(tokens_BS == eod, after_S, 0)  # the next token begins a document
    return F.pad(begins_BS[:, :-1], (1, 0)).cummax(dim=1).values


def same_document(starts_BS: Tensor, queries_Q: Tensor, keys_S: Tensor) -> Tensor:
    """True if the tokens at these positions are of one document: boolean ``[B, 1, Q, S]``, for all
    heads.
    """
    return (starts_BS[:, queries_Q, None] == starts_BS[:, None, keys_S]).unsqueeze(1)


def turned_back(x_SBNC: Tensor, starts_SB: Tensor, rates_R: Tensor) -> Tensor:
    """Subtract ``starts_SB`` from the rotary positions of a query or key: rotations add up, so position p
    rotated back by s is position p - s.

    RoFormer (2104.09864, eq. 34) with channel i paired with channel i + R, as in megatron-core; channels
    from 2 R on have no positions.
    """
    rates_R = rates_R.to(x_SBNC.device)
    angles = -starts_SB.float()[:, :, None, None] * rates_R
    cos, sin = angles.cos(), angles.sin()
    first, second, still = x_SBNC.float().tensor_split([rates_R.numel(), 2 * rates_R.numel()], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, still], -1).to(x_SBNC.dtype)
