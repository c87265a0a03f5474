"""The language-model loss, the same in both engines.

Legend: ``B`` batch, ``S`` sequence, ``V`` vocabulary (padded).
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

UNCOUNTED = -1  # a label that no loss is asked for


class LanguageModelLoss:
    """Cross-entropy in float32 over the labels that count; keeps the sums of the current step, or of the
    current evaluation.

    ``scale``: what the mean over all positions of a micro-batch is multiplied by.  Micro-batches differ in
    how many labels count; with positions / counted labels of the global batch, the mean over micro-batches is
    the mean over all labels that count.
    """

    def __init__(self, device: torch.device) -> None:
        """``device``: where the sums are kept, also on a pipeline stage that computes no loss."""
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, target bytes
        self.token_bytes_V: Tensor | None = None
        self.scale: Tensor | None = None

    def __call__(self, logits_SBV: Tensor, labels_BS: Tensor) -> Tensor:
        """The micro-batch's part of the mean, in nats per token; logits may be cut over tensor-parallel
        ranks.
        """
        labels_SB = labels_BS.t().contiguous()
        loss_SB: Tensor = vocab_parallel_cross_entropy(logits_SBV.float(), labels_SB.clamp(min=0))
        return self.mean(loss_SB, labels_SB)

    def mean(self, loss: Tensor, labels: Tensor) -> Tensor:
        """Mean of per-token losses, of the same shape as ``labels``, times ``scale``; counts them."""
        counted = labels >= 0
        loss = torch.where(counted, loss, 0.0)
        with torch.no_grad():
            # A new number on a GPU makes the host wait; zeros that are filled there do not.
            bytes_ = self.sums.new_zeros(())
            if self.token_bytes_V is not None:
                bytes_ = (self.token_bytes_V[labels.clamp(min=0)] * counted).sum()
            row = (loss.sum(dtype=torch.float64), counted.sum(), bytes_)
            self.sums = self.sums + torch.stack([value.double() for value in row])
        return loss.mean() if self.scale is None else loss.mean() * self.scale

    def take(self) -> Tensor:
        """The sums so far; starts afresh."""
        sums, self.sums = self.sums, torch.zeros_like(self.sums)
        return sums
