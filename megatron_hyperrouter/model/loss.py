"""The language-model loss, the same in both engines.

Legend: ``B`` batch, ``S`` sequence, ``V`` vocabulary (padded).
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor


class LanguageModelLoss:
    """Cross-entropy in float32; keeps the sums of the current step, or of the current evaluation."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes of the targets
        self.token_bytes_V: Tensor | None = None

    def __call__(self, logits_SBV: Tensor, labels_BS: Tensor) -> Tensor:
        """Mean over the micro-batch, in nats per token; logits may be cut over tensor-parallel ranks."""
        labels_SB = labels_BS.t().contiguous()
        loss_SB: Tensor = vocab_parallel_cross_entropy(logits_SBV.float(), labels_SB)
        return self.mean(loss_SB, labels_SB)

    def mean(self, loss: Tensor, labels: Tensor) -> Tensor:
        """Mean of per-token losses, of the same shape as ``labels``; counts them."""
        with torch.no_grad():
            bytes_ = 0 if self.token_bytes_V is None else self.token_bytes_V[labels].sum()
            row = (loss.sum(dtype=torch.float64), labels.numel(), bytes_)
            added = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=loss.device) for value in row])
            self.sums = self.sums.to(loss.device) + added
        return loss.mean()

    def take(self) -> Tensor:
        """The sums so far; starts afresh."""
        sums, self.sums = self.sums, torch.zeros_like(self.sums)
        return sums
