"""Unigram and bigram baselines.  A model that does not beat them has learned only token frequencies and
pairs.

The bigram is interpolated Kneser-Ney with three discounts (Chen and Goodman 1999, "An empirical study of
smoothing techniques for language modeling", section 3).  It is the strongest of the simple bigrams and has
nothing to tune.  For context c, target t, and counts n:

    p(t | c) = (n(c t) - D(n(c t))) / n(c) + gamma(c) * p_low(t)      p_low(t) if c was never seen
    p_low(t) = (m(t) - D'(m(t))) / sum m + gamma' / V                 m(t): different tokens before t

D(0) = 0; D(1), D(2) and D(3 or more) follow from how many counts are 1, 2, 3 and 4; gamma makes each
distribution sum to 1.  The unigram is p(t) = (n(t) + 1/2) / (sum n + V/2).

Legend: ``V`` token ids, ``T`` training tokens, ``U`` different pairs among them, ``N`` scored pairs.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from megatron_hyperrouter.errors import DataError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_CHUNK = 1 << 20  # tokens handled at a time: bounds memory, changes no result


class NgramBaselines:
    """Unigram and bigram fitted on training tokens.

    ``stretches_T``: arrays of token ids in [0, ``vocab_size``), of any integer type (memory maps too); no
    pair joins two of them. DataError for an id outside the vocabulary, or for no tokens at all.
    """

    def __init__(self, stretches_T: Iterable[NDArray[np.integer]], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        counts_V = np.zeros(vocab_size, dtype=np.int64)
        self._keys_U, self._counts_U = _count_pairs(stretches_T, vocab_size, counts_V)
        self.num_tokens = int(counts_V.sum())
        if not self.num_tokens:
            raise DataError(
                "there are no tokens on which to fit the unigram and bigram baselines",
                remedy="choose training data that contain text",
            )
        self.unigram_V: Floats = np.asarray(counts_V + 0.5, dtype=np.float64) / (
            self.num_tokens + 0.5 * vocab_size
        )
        self.lower_V = self._lower_order()
        self._discounts_4 = _discounts(self._counts_U)
        contexts_U = self._keys_U // vocab_size
        self._context_counts_V = np.bincount(contexts_U, weights=self._counts_U, minlength=vocab_size)
        taken_V = np.bincount(
            contexts_U, weights=self._discounts_4[np.minimum(self._counts_U, 3)], minlength=vocab_size
        )
        # A context never seen leaves all its mass to the lower order.
        self._gamma_V: Floats = np.where(
            self._context_counts_V > 0, taken_V / np.maximum(self._context_counts_V, 1), 1.0
        )

    def unigram_nats(self, targets_N: NDArray[np.integer]) -> float:
        """Mean of -log p(target), in nats a token."""
        return -float(np.log(self.unigram_V[_checked(targets_N, self.vocab_size)]).mean())

    def bigram_nats(self, contexts_N: NDArray[np.integer], targets_N: NDArray[np.integer]) -> float:
        """Mean of -log p(target | context), in nats a token; a context is the token before its target."""
        contexts = _checked(contexts_N, self.vocab_size)
        targets = _checked(targets_N, self.vocab_size)
        if contexts.shape != targets.shape:
            raise ValueError(f"contexts have shape {contexts.shape}, but targets have shape {targets.shape}")
        total = 0.0
        for start in range(0, targets.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            total += float(np.log(self.bigram_N(contexts[part], targets[part])).sum())
        return -total / targets.size

    def bigram_N(self, contexts_N: Ints, targets_N: Ints) -> Floats:
        """p(target | context) of each pair."""
        keys_N = contexts_N * self.vocab_size + targets_N
        backed_off_N: Floats = self._gamma_V[contexts_N] * self.lower_V[targets_N]
        if not self._keys_U.size:
            return backed_off_N
        place_N = np.minimum(np.searchsorted(self._keys_U, keys_N), self._keys_U.size - 1)
        counts_N = np.where(self._keys_U[place_N] == keys_N, self._counts_U[place_N], 0)
        kept_N = counts_N - self._discounts_4[np.minimum(counts_N, 3)]
        result: Floats = kept_N / np.maximum(self._context_counts_V[contexts_N], 1) + backed_off_N
        return result

    def _lower_order(self) -> Floats:
        """p_low over the vocabulary; uniform where no pair was seen."""
        before_V = np.bincount(self._keys_U % self.vocab_size, minlength=self.vocab_size)
        if not before_V.any():
            return np.full(self.vocab_size, 1.0 / self.vocab_size)
        taken_V = _discounts(before_V)[np.minimum(before_V, 3)]
        lower_V: Floats = (before_V - taken_V + taken_V.sum() / self.vocab_size) / before_V.sum()
        return lower_V


def _count_pairs(
    stretches_T: Iterable[NDArray[np.integer]], vocab_size: int, counts_V: Ints
) -> tuple[Ints, Ints]:
    """Different pairs as sorted keys ``context * V + target``, with their counts; adds single tokens to
    ``counts_V``.
    """
    keys_U = np.zeros(0, dtype=np.int64)
    counts_U = np.zeros(0, dtype=np.int64)
    waiting: list[Ints] = []
    size = 0
    for stretch in stretches_T:
        for start in range(0, stretch.size, _CHUNK):
            first = max(start - 1, 0)  # the token before the chunk is the first context
            tokens = _checked(stretch[first : start + _CHUNK], vocab_size)
            counts_V += np.bincount(tokens[start - first :], minlength=vocab_size)
            waiting.append(tokens[:-1] * vocab_size + tokens[1:])
            size += tokens.size
            if size >= _CHUNK:
                keys_U, counts_U = _merge(keys_U, counts_U, waiting)
                waiting, size = [], 0
    return _merge(keys_U, counts_U, waiting) if waiting else (keys_U, counts_U)


def _merge(keys_U: Ints, counts_U: Ints, waiting: list[Ints]) -> tuple[Ints, Ints]:
    fresh, fresh_counts = np.unique(np.concatenate(waiting), return_counts=True)
    keys = np.concatenate([keys_U, fresh])
    counts = np.concatenate([counts_U, fresh_counts])
    if not keys.size:
        return keys, counts
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.add.reduceat(counts, starts)


def _discounts(counts: NDArray[np.integer]) -> Floats:
    """What to take from a count of 0, 1, 2, and 3 or more (Chen and Goodman's closed form).

    The form needs some counts of each of 1, 2, 3 and 4; where it gives no discount between 0 and the count,
    half the count is taken.
    """
    ones, twos, threes, fours = (int((counts == n).sum()) for n in (1, 2, 3, 4))
    found = [0.5, 1.0, 1.5]
    if ones and twos and threes:
        share = ones / (ones + 2 * twos)
        closed = [1 - 2 * share * twos / ones, 2 - 3 * share * threes / twos, 3 - 4 * share * fours / threes]
        found = [
            value if 0 < value < n else fallback
            for n, (value, fallback) in enumerate(zip(closed, found, strict=True), start=1)
        ]
    return np.array([0.0, *found])


def _checked(tokens: NDArray[np.integer], vocab_size: int) -> Ints:
    """The ids as int64; DataError for one outside the vocabulary."""
    ids = np.asarray(tokens).astype(np.int64)
    if not ids.size:
        return ids
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocab_size:
        bad = lowest if lowest < 0 else highest
        raise DataError(
            f"token id {bad} is outside the vocabulary of {vocab_size} ids",
            remedy="use the tokenizer that made the data",
        )
    return ids
