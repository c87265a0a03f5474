"""A classification head in the place of the output matrix, the same in both engines.

A batch is a language model's: ``tokens_BS`` hold ``PADDING`` behind the last real token of each text, and
``labels_BS`` hold the text's class at that token and ``UNCOUNTED`` everywhere else.

Legend: ``B`` texts, ``S`` positions, ``D`` hidden size, ``C`` classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_hyperrouter.model.loss import UNCOUNTED, LanguageModelLoss

PADDING = -1  # the id of a token that is none


@dataclass(frozen=True)
class Classifier:
    """What fine-tuning adds to a model, and what it leaves as it is."""

    num_classes: int
    dropout: float = 0.0  # in the head
    freeze: frozenset[str] = frozenset()  # of "router" and "experts"

    def freezes(self, name: str) -> bool:
        """Whether the parameter with this global name keeps its value."""
        router = ".mlp.router." in name
        expert = ".mlp.experts." in name or ".mlp.shared_experts." in name
        return (router and "router" in self.freeze) or (expert and "experts" in self.freeze)


class Head(nn.Module):
    """``W2 tanh(W1 h + b1) + b2`` with dropout before ``W2``."""

    def __init__(self, hidden_size: int, classifier: Classifier, dtype: torch.dtype) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size, dtype=dtype)
        self.out = nn.Linear(hidden_size, classifier.num_classes, dtype=dtype)
        self.dropout = nn.Dropout(classifier.dropout)

    def forward(self, hidden_BD: Tensor) -> Tensor:
        """Scores ``_BC``."""
        scores_BC: Tensor = self.out(self.dropout(self.dense(hidden_BD).tanh()))
        return scores_BC


class Headed(NamedTuple):
    """What :class:`ClassLoss` makes the scores of: the labels say at which positions."""

    hidden_SBD: Tensor  # of all positions, on every tensor-parallel rank
    head: Head


class ClassOutput(nn.Module):
    """Serves both hosts' output slot; hands its factors to the loss, as :class:`OutputLayer` does."""

    sequence_parallel = False  # to the host: nothing is left to gather

    def __init__(self, config: TransformerConfig, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = Head(config.hidden_size, classifier, config.params_dtype)
        self._cut = config.sequence_parallel

    def forward(self, input_: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Headed, None]:
        """``input_``: ``_SBD``, or this tensor-parallel rank's part of the positions."""
        # Every rank computes the whole loss, so each takes its own part of the gradient back.
        hidden_SBD = (
            gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=False)
            if self._cut
            else input_
        )
        return Headed(hidden_SBD, self.classifier), None


class ClassLoss(LanguageModelLoss):
    """Cross-entropy in float32, mean over the texts of the micro-batch.

    ``kept``: where it is a list, the scores ``_BC`` and classes ``_B`` of every micro-batch are added to it.
    """

    kept: list[tuple[Tensor, Tensor]] | None = None

    def __call__(self, output: Any, labels_BS: Tensor) -> Tensor:
        """The micro-batch's mean; texts without a class count nowhere."""
        classes_B = labels_BS.amax(1)
        last_B = labels_BS.argmax(1)
        rows_B = torch.arange(len(last_B), device=last_B.device)
        scores_BC = output.head(output.hidden_SBD[last_B, rows_B]).float()
        losses_B = F.cross_entropy(scores_BC, classes_B, ignore_index=UNCOUNTED, reduction="none")
        self._count(losses_B.detach(), classes_B)
        if self.kept is not None:
            self.kept.append((scores_BC.detach(), classes_B))
        return losses_B.sum() / len(classes_B)
