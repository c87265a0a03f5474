"""The language-model loss, and that of a classification head, the same in both engines.

Legend: ``B`` batch, ``S`` sequence, ``T = S * B`` tokens, ``V`` vocabulary (padded).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor, nn

from megatron_hyperrouter.model.output import Projection, token_losses

UNCOUNTED = -1  # a label that the loss ignores


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

    def __call__(self, output: Projection | Tensor, labels_BS: Tensor) -> Tensor:
        """The micro-batch's part of the mean, in nats per token, from the output of :class:`OutputLayer`:
        logits ``_SBV``, or their two factors, both split over tensor-parallel ranks.
        """
        labels_SB = labels_BS.t().contiguous()
        total, losses_T = _losses(output, labels_SB)
        self._count(losses_T.detach(), labels_SB.flatten())
        mean = total / labels_SB.numel()
        return mean if self.scale is None else mean * self.scale

    def ahead(self, output: Projection | Tensor, labels_BS: Tensor, places: int) -> Tensor:
        """Mean loss of the predictions of the tokens ``places`` after the next one, over the labels that
        count.  The labels were already shifted, so the last ``places`` of them are ignored.  The sums do
        not include this loss.
        """
        # a copy, because it is written to; for one sample, contiguous() would copy nothing
        labels_SB = labels_BS.t().clone(memory_format=torch.contiguous_format)
        labels_SB[-places:] = UNCOUNTED
        total, _ = _losses(output, labels_SB)
        return total / (labels_SB >= 0).sum().clamp(min=1)

    @torch.no_grad()
    def _count(self, losses_T: Tensor, labels_T: Tensor) -> None:
        counted_T = labels_T >= 0
        # A new number on a GPU makes the host wait; zeros that are filled there do not.
        bytes_ = self.sums.new_zeros(())
        if self.token_bytes_V is not None:
            bytes_ = (self.token_bytes_V[labels_T.clamp(min=0)] * counted_T).sum()
        row = (losses_T.sum(dtype=torch.float64), counted_T.sum(), bytes_)
        self.sums = self.sums + torch.stack([value.double() for value in row])

    def take(self) -> Tensor:
        """Return the sums so far, and reset them."""
        sums, self.sums = self.sums, torch.zeros_like(self.sums)
        return sums


class ClassLoss(LanguageModelLoss):
    """Cross-entropy in float32, mean over the texts of the micro-batch.

    ``kept``: if it is a list, the scores ``_BC`` and classes ``_B`` of every micro-batch are added to it.
    """

    kept: list[tuple[Tensor, Tensor]] | None = None

    def __call__(self, output: Any, labels_BS: Tensor) -> Tensor:
        """The micro-batch's mean; texts without a class are ignored."""
        classes_B = labels_BS.amax(1)
        last_B = labels_BS.argmax(1)
        rows_B = torch.arange(len(last_B), device=last_B.device)
        scores_BC = output.head(output.hidden_SBD[last_B, rows_B]).float()
        losses_B = F.cross_entropy(scores_BC, classes_B, ignore_index=UNCOUNTED, reduction="none")
        self._count(losses_B.detach(), classes_B)
        if self.kept is not None:
            self.kept.append((scores_BC.detach(), classes_B))
        return losses_B.sum() / len(classes_B)


def _losses(output: Projection | Tensor, labels_SB: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the labels that count, and the loss of each token, ``_T``."""
    if not isinstance(output, Tensor):
        return token_losses(output, labels_SB.flatten())
    losses_SB: Tensor = vocab_parallel_cross_entropy(output.float(), labels_SB.clamp(min=0))
    losses_T = torch.where(labels_SB >= 0, losses_SB, 0.0).flatten()
    return losses_T.sum(), losses_T


@contextmanager
def captured_logits(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Within this context, collects the logits of the output layer, ``_SBV``.  They are copies, because the
    loss overwrites its input.
    """
    seen: list[Tensor] = []

    def note(_layer: Any, _inputs: Any, output: tuple[Tensor, Any]) -> None:
        seen.append(output[0].detach().float().clone())

    hooks = [
        part.register_forward_hook(note)
        for module in modules
        for name, part in module.named_modules()
        if name.endswith("output_layer")
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def whole_logits(seen: list[Tensor], *, tensor_size: int, stages: int) -> Tensor:
    """``_BSV`` on every rank that worked on these samples, from the parts of each micro-batch that some of
    them have (collective).
    """
    part_SBV = torch.cat(seen, 1) if seen else None
    if tensor_size > 1 and part_SBV is not None:
        pieces = [torch.empty_like(part_SBV) for _ in range(tensor_size)]
        group = parallel_state.get_tensor_model_parallel_group()
        dist.all_gather(pieces, part_SBV.contiguous(), group=group)
        part_SBV = torch.cat(pieces, -1)
    if stages > 1:
        held = [part_SBV]
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast_object_list(held, src=last, group=group)
        part_SBV = held[0]
    if part_SBV is None:
        raise RuntimeError("the forward pass did not reach an output layer")
    return part_SBV.transpose(0, 1).contiguous()
