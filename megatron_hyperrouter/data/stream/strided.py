"""A split as overlapping windows of consecutive text, for an evaluation in which each token has a long
context.

Documents are read in the order of the file.  Each window begins ``stride`` tokens after the previous one,
and only its last ``stride`` tokens are scored; the first window of a file is scored completely.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_hyperrouter.data.order.blend import parse_blend
from megatron_hyperrouter.data.store.token_files import IndexedDataset
from megatron_hyperrouter.data.stream.dataset import SPLITS, Builder, Sample
from megatron_hyperrouter.errors import ConfigError, DataError, Problem


class StridedDataset:
    """The windows of one or several files, one file after the other."""

    def __init__(
        self,
        parts: Sequence[tuple[IndexedDataset, range]],
        *,
        seq_length: int,
        stride: int,
        vocab_size: int,
    ) -> None:
        """``parts``: files, and their documents that the split has."""
        self.seq_length, self.stride, self.vocab_size = seq_length, stride, vocab_size
        self._windows: list[tuple[IndexedDataset, int, bool]] = []  # file, first token, first of its file
        for store, documents in parts:
            item = store.dtype.itemsize
            begin = int(store.pointers[documents.start]) // item
            end = int(store.pointers[documents.stop - 1]) // item + int(store.sizes[documents.stop - 1])
            starts = range(begin, end - seq_length, stride)
            self._windows += [(store, start, start == begin) for start in starts]

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._windows)

    def __getitem__(self, i: int) -> Sample:
        """Window ``i``: int64 [S + 1].  DataError for a token id outside the vocabulary."""
        store, start, _ = self._windows[i]
        store.check_length()
        sample = store.tokens[start : start + self.seq_length + 1].astype(np.int64)
        if sample.max() >= self.vocab_size or sample.min() < 0:
            raise DataError(
                f"{store.bin_path}: a token id is outside the vocabulary of {self.vocab_size} ids",
                remedy="evaluate with the tokenizer that made this file",
            )
        return sample

    def unscored(self, i: int) -> int:
        """How many of the first labels of window ``i`` are not scored, because another window has scored
        them.
        """
        return 0 if self._windows[i][2] else self.seq_length - self.stride


def strided(builder: Builder, split: str, stride: int) -> StridedDataset:
    """The windows of a split.  Raises ConfigError for a stride that leaves tokens out, and for packed
    documents.
    """
    if not 1 <= stride <= builder.seq_length:
        rule = f"must be from 1 to {builder.seq_length}, the number of tokens in a sample"
        raise ConfigError([Problem("--eval-stride", stride, rule, f"use {-(-builder.seq_length // 8)}")])
    if builder.data.pack_documents:
        rule = "cannot be combined with --pack-documents"
        raise ConfigError([Problem("--eval-stride", stride, rule, "leave out --eval-stride")])
    number = SPLITS.index(split)
    flag, words = builder.words(number)
    parts = []
    for prefix in parse_blend(words, flag=flag).prefixes if words else ():
        documents = builder.documents(prefix, number)
        if documents:
            parts.append((builder.open(prefix), documents))
    found = StridedDataset(parts, seq_length=builder.seq_length, stride=stride, vocab_size=builder.vocab_size)
    if not len(found):
        raise DataError(
            f"the {split} split has no text of at least {builder.seq_length + 1} tokens",
            remedy="choose another split with --split, or other data with --data-path",
        )
    return found
