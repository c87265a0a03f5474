"""Texts as micro-batches: padded at the right, labelled at their last token.

Legend: ``B`` texts of a micro-batch, ``S`` positions, ``N`` texts of a split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_hyperrouter.model.classifier import PADDING
from megatron_hyperrouter.model.loss import UNCOUNTED

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer
    from megatron_hyperrouter.engines.base import Batch, RankPlace
    from megatron_hyperrouter.finetuning.tasks import Example

Numbers = NDArray[np.int64]
_ALONE = -1  # stands for no text, to fill up a round of an evaluation


@dataclass(frozen=True)
class TextsOfSplit:
    """The texts of one split (training, validation or test) as token ids, and their classes."""

    ids: Sequence[Numbers]
    classes_N: Numbers

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(map(len, self.ids))


def encoded(examples: Sequence[Example], tokenizer: Tokenizer, seq_length: int) -> TextsOfSplit:
    """Each text, followed by the token that ends a document; a text that is too long keeps its last
    ``seq_length`` tokens.
    """
    texts = tokenizer.encode_batch([example.text for example in examples])
    rows = [np.append(ids, tokenizer.eod)[-seq_length:].astype(np.int64) for ids in texts]
    return TextsOfSplit(rows, np.array([example.label for example in examples], dtype=np.int64))


class Feed:
    """This rank's micro-batches: which texts they contain depends on the seed and the step alone."""

    def __init__(self, config: RunConfig, place: RankPlace) -> None:
        self._micro = config.train.micro_batch_size
        self._together = self._micro * place.data_size
        self._global = config.train.global_batch_size or self._together
        self._place, self._length = place, config.model.seq_length
        # Pipeline stages expect equal shapes; elsewhere a micro-batch is as long as its longest text.
        self._fixed = config.parallel.pipeline_model_parallel_size > 1
        self._multiple = 8 * config.parallel.tensor_model_parallel_size

    def step(self, part: TextsOfSplit, *, step: int, seed: int) -> Iterator[Batch]:
        """The micro-batches of training step ``step``, from 0: each epoch has another order, and no text
        is dropped.
        """
        first = step * self._global + self._place.data_rank * self._micro
        for start in range(first, (step + 1) * self._global, self._together):
            yield self._batch(part, [_drawn(start + row, len(part), seed) for row in range(self._micro)])

    def all(self, part: TextsOfSplit) -> Iterator[Batch]:
        """The micro-batches of an evaluation of the whole split, equally many on every rank: see
        :func:`order`.
        """
        rows = self.order(part)
        for start in range(self._place.data_rank * self._micro, len(rows), self._together):
            yield self._batch(part, rows[start : start + self._micro])

    def order(self, part: TextsOfSplit) -> list[int]:
        """The texts of an evaluation, the shortest first, filled up to whole rounds of all ranks."""
        rows = sorted(range(len(part)), key=lambda row: (len(part.ids[row]), row))
        return rows + [_ALONE] * (-len(rows) % self._together)

    def rows_of(self, part: TextsOfSplit, data_rank: int) -> list[int]:
        """The texts of that data-parallel rank's micro-batches in an evaluation, in order."""
        rows = self.order(part)
        starts = range(data_rank * self._micro, len(rows), self._together)
        return [row for start in starts for row in rows[start : start + self._micro]]

    def _batch(self, part: TextsOfSplit, rows: Sequence[int]) -> Batch:
        texts = [part.ids[max(row, 0)] for row in rows]
        longest = -(-max(map(len, texts)) // self._multiple) * self._multiple
        length = self._length if self._fixed else min(longest, self._length)
        tokens_BS = torch.full((len(rows), length), PADDING, dtype=torch.int64, device="cpu")
        labels_BS = torch.full_like(tokens_BS, UNCOUNTED)
        for place, (row, ids) in enumerate(zip(rows, texts, strict=True)):
            tokens_BS[place, : len(ids)] = torch.from_numpy(ids)
            if row != _ALONE:
                labels_BS[place, len(ids) - 1] = int(part.classes_N[row])
        return tokens_BS, labels_BS


def _drawn(number: int, size: int, seed: int) -> int:
    """The text that training reads at position ``number``, from 0."""
    epoch, place = divmod(number, size)
    return int(_order_of(size, seed, epoch)[place])


@lru_cache(maxsize=2)
def _order_of(size: int, seed: int, epoch: int) -> Numbers:
    return np.random.default_rng([seed, epoch]).permutation(size)
