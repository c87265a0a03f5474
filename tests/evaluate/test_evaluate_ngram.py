"""The n-gram baselines against a loop over dictionaries, and as probability distributions."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hyperrouter.errors import DataError
from megatron_hyperrouter.evaluate import ngram
from megatron_hyperrouter.evaluate.ngram import NgramBaselines

V = 6
STRETCHES = st.lists(st.lists(st.integers(0, V - 1), max_size=60), min_size=1, max_size=5).filter(any)


def discounts_by_hand(counts: list[int]) -> dict[int, float]:
    """Chen and Goodman's three discounts, with half the count where their form has nothing to say."""
    of = Counter(counts)
    found = {1: 0.5, 2: 1.0, 3: 1.5}
    if of[1] and of[2] and of[3]:
        share = of[1] / (of[1] + 2 * of[2])
        for n in (1, 2, 3):
            value = n - (n + 1) * share * of[n + 1] / of[n]
            if 0 < value < n:
                found[n] = value
    return found


def bigram_by_hand(stretches: list[list[int]], context: int, target: int) -> float:
    """p(target | context), from counts in dictionaries."""
    pairs = Counter(pair for stretch in stretches for pair in pairwise(stretch))
    before = Counter(t for _, t in pairs)
    if pairs:
        taken = discounts_by_hand(list(before.values()))
        kept = before[target] - taken[min(before[target], 3)] if before[target] else 0
        spread = sum(taken[min(count, 3)] for count in before.values())
        lower = (kept + spread / V) / len(pairs)
    else:
        lower = 1 / V
    row = {pair: count for pair, count in pairs.items() if pair[0] == context}
    if not row:
        return lower
    taken = discounts_by_hand(list(pairs.values()))
    count = pairs[context, target]
    kept = count - taken[min(count, 3)] if count else 0
    gamma = sum(taken[min(count, 3)] for count in row.values()) / sum(row.values())
    return kept / sum(row.values()) + gamma * lower


def fitted(stretches: list[list[int]], dtype: type = np.uint16) -> NgramBaselines:
    return NgramBaselines([np.array(stretch, dtype=dtype) for stretch in stretches], V)


@given(stretches=STRETCHES, chunk=st.sampled_from([1, 2, 3, 7, 1 << 20]))
def test_equal_to_loops_over_dictionaries(stretches: list[list[int]], chunk: int) -> None:
    contexts, targets = (grid.ravel() for grid in np.meshgrid(np.arange(V), np.arange(V), indexing="ij"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "_CHUNK", chunk)
        ours = fitted(stretches)
        nats = ours.bigram_nats(contexts, targets)
    expected = [
        bigram_by_hand(stretches, c, t) for c, t in zip(contexts.tolist(), targets.tolist(), strict=True)
    ]
    np.testing.assert_allclose(ours.bigram_N(contexts, targets), expected, rtol=1e-12)
    assert nats == pytest.approx(-sum(map(math.log, expected)) / V**2, rel=1e-12)
    tokens = [token for stretch in stretches for token in stretch]
    unigram = [(tokens.count(t) + 0.5) / (len(tokens) + V / 2) for t in range(V)]
    assert ours.unigram_nats(np.arange(V)) == pytest.approx(-sum(map(math.log, unigram)) / V, rel=1e-12)


@given(STRETCHES)
def test_every_context_has_a_distribution(stretches: list[list[int]]) -> None:
    ours = fitted(stretches)
    grid = np.array([ours.bigram_N(np.full(V, context), np.arange(V)) for context in range(V)])
    assert (grid > 0).all()
    np.testing.assert_allclose(grid.sum(axis=1), 1, rtol=1e-12)
    assert ours.unigram_V.sum() == pytest.approx(1)


def test_closed_form_discounts_on_a_long_tail() -> None:
    """Counts 1, 2, 3, 4 as in natural text: the three discounts are Chen and Goodman's, computed by hand."""
    counts = np.array([1] * 40 + [2] * 15 + [3] * 8 + [4] * 5 + [9] * 3)
    share = 40 / 70
    expected = [0, 1 - 2 * share * 15 / 40, 2 - 3 * share * 8 / 15, 3 - 4 * share * 5 / 8]
    np.testing.assert_allclose(ngram._discounts(counts), expected, rtol=1e-12)
    assert expected[1] != 0.5  # not the fallback


def test_neighbours_tell_more_than_frequencies() -> None:
    """Tokens that follow a noisy cycle: the bigram comes close to the noise, the unigram to the logarithm of
    V.
    """
    random = np.random.default_rng(0)
    steps = np.where(random.random(40000) < 0.9, 1, random.integers(0, V, 40000))
    tokens = np.cumsum(steps) % V
    ours = NgramBaselines([tokens[:30000]], V)
    follows = 0.9 + 0.1 / V
    noise = -follows * math.log(follows) - (1 - follows) * math.log((1 - follows) / (V - 1))
    assert ours.bigram_nats(tokens[30000:-1], tokens[30001:]) == pytest.approx(noise, abs=0.03)
    assert ours.unigram_nats(tokens[30001:]) == pytest.approx(math.log(V), abs=0.01)


def test_no_pair_joins_two_stretches() -> None:
    apart, together = fitted([[0, 1], [2, 3]]), fitted([[0, 1, 2, 3]])
    assert together.bigram_N(np.array([1]), np.array([2])) > 2 * apart.bigram_N(np.array([1]), np.array([2]))


@pytest.mark.parametrize("bad", [V, -1])
def test_ids_outside_the_vocabulary_are_refused(bad: int) -> None:
    with pytest.raises(DataError, match=f"token id {bad} is outside the vocabulary of {V}"):
        fitted([[0, bad, 1]], np.int32)
    ours = fitted([[0, 1, 2]])
    with pytest.raises(DataError, match="outside the vocabulary"):
        ours.unigram_nats(np.array([bad]))
    with pytest.raises(DataError, match="outside the vocabulary"):
        ours.bigram_nats(np.array([bad]), np.array([0]))


def test_nothing_to_fit_or_mismatched_pairs() -> None:
    with pytest.raises(DataError, match="no tokens"):
        NgramBaselines([np.zeros(0, np.int32)], V)
    with pytest.raises(ValueError, match=r"contexts have shape \(2,\), but targets have shape \(3,\)"):
        fitted([[0, 1]]).bigram_nats(np.arange(2), np.arange(3))
