"""A classification head that replaces the output matrix, the same in both engines.

A batch has the form of a language model's: ``tokens_BS`` has ``PADDING`` after the last real token of each
text, and ``labels_BS`` has the class of the text at that token and ``UNCOUNTED`` everywhere else.

Legend: ``B`` texts, ``S`` positions, ``D`` hidden size, ``C`` classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

PADDING = -1  # the id in padding


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
    """The input of ``loss.ClassLoss``, which computes the scores at the positions that the labels mark."""

    hidden_SBD: Tensor  # of all positions, on every tensor-parallel rank
    head: Head
