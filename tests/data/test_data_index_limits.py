"""Indices where numbers change their width, and with arguments that no caller gives: the extension and its
twin agree, or both refuse.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from megatron_hyperrouter.data.order import _numpy_index, index

helpers = importlib.import_module("megatron.core.datasets.helpers")
native = pytest.mark.skipif("C++" not in index.IMPLEMENTATIONS, reason="the extension is not built")
REFUSALS = (ValueError, IndexError, MemoryError)


def outcome(impl: Any, name: str, *arguments: Any) -> Any:
    """What a function returns, as a list, or None where it refuses."""
    try:
        return np.asarray(getattr(impl, name)(*arguments)).tolist()
    except REFUSALS:
        return None


# ---- many documents: the extension copies their sizes to uint16 where each fits ----


@native
@pytest.mark.parametrize("largest", [65_535, 65_536, 2**31 - 1])
@pytest.mark.parametrize("count", [2**18 - 1, 2**18, 2**18 + 1])
def test_sizes_on_both_sides_of_16_bits_in_as_many_documents_as_are_narrowed(count, largest):
    random = np.random.default_rng(count)
    sizes = random.integers(0, 4, count).astype(np.int32)
    sizes[random.permutation(count)[:2]] = 65_535, 65_534
    sizes[[0, count // 2, -1][count % 3]] = largest
    tokens, order = int(sizes.sum(dtype=np.int64)), random.permutation(count).astype(np.int32)
    seq_length = 1 + tokens // 50_000
    for extra in (0, 1):
        for drop_last in (True, False):
            asked = (sizes, order, seq_length, 1, tokens, drop_last, extra)
            found = index.sample_index(*asked)
            np.testing.assert_array_equal(found, helpers.build_sample_idx_int32(*asked))
            np.testing.assert_array_equal(found, index.sample_index(*asked, impl=_numpy_index))
    samples = (tokens - 1) // seq_length
    for ids in (order, order.astype(np.int64)):
        wide = index.IMPLEMENTATIONS["C++"].sample_index(sizes, ids, seq_length, samples, tokens, 1, True)
        assert wide.dtype == np.int64
        np.testing.assert_array_equal(
            wide, helpers.build_sample_idx_int64(sizes, order, seq_length, 1, tokens, True, 1)
        )


@native
def test_a_part_of_many_documents_and_several_epochs_of_them():
    sizes = np.random.default_rng(0).integers(0, 9, 2**18).astype(np.int32)
    sizes[77] = -5  # of no document that is read
    everyone = np.delete(np.arange(2**18, dtype=np.int32), 77)
    for count in (2**17 - 1, 2**17, 2**17 + 1, len(everyone)):  # narrowed where half of them are read
        order = np.tile(np.random.default_rng(count).permutation(everyone)[:count], 2)
        tokens = int(sizes[order].sum()) // 2
        asked = (sizes, order, 100, 2, tokens, False)
        np.testing.assert_array_equal(
            index.sample_index(*asked), index.sample_index(*asked, impl=_numpy_index)
        )
    with pytest.raises(ValueError, match=r"sizes\[77\] = -5 is negative"):
        index.sample_index(sizes, np.arange(2**18, dtype=np.int32), 100, 1, tokens, False)


# ---- arguments that no caller gives ----


@native
@pytest.mark.skipif(
    "ASAN_OPTIONS" in os.environ, reason="there a request that cannot be met ends the process"
)
def test_rows_that_the_system_has_no_memory_for_are_refused():
    with pytest.raises(MemoryError):
        index.IMPLEMENTATIONS["C++"].sample_index(
            np.ones(1, np.int32), np.zeros(1, np.int32), 1, 2**55, 5, 1, False
        )


ids = st.one_of(st.integers(-1, 8), st.sampled_from([2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63)]))
lengths = st.one_of(st.integers(0, 3), st.integers(-1, 9), st.sampled_from([65_535, 65_536, 2**31 - 1]))
wholes = st.one_of(st.integers(-1, 12), st.sampled_from([2**31, 2**62, 2**63 - 1]))


@native
@given(
    sizes=st.lists(lengths, max_size=8),
    order=st.lists(ids, max_size=30),
    seq_length=wholes,
    num_samples=st.one_of(st.integers(-1, 40), st.sampled_from([2**61, 2**63 - 1])),
    num_tokens=wholes,
    extra=st.integers(0, 1),
    wide=st.booleans(),
)
@example(sizes=[3], order=[2**62], seq_length=1, num_samples=1, num_tokens=3, extra=1, wide=False)
@example(sizes=[3], order=[0], seq_length=1, num_samples=2**63 - 1, num_tokens=3, extra=1, wide=False)
@example(sizes=[0, 0], order=[0, 1], seq_length=1, num_samples=1, num_tokens=0, extra=1, wide=True)
@example(sizes=[2, 0], order=[0, 1], seq_length=2**62, num_samples=1, num_tokens=2, extra=1, wide=True)
@example(
    sizes=[2**31 - 1],
    order=[0, 0],
    seq_length=2**31,
    num_samples=1,
    num_tokens=2**32 - 2,
    extra=0,
    wide=False,
)
def test_sample_index_takes_what_the_twin_takes(
    sizes, order, seq_length, num_samples, num_tokens, extra, wide
):
    given_sizes = np.array(sizes, np.int32)
    kinds = [np.int64, np.int32] if all(-(2**31) <= number < 2**31 for number in order) else [np.int64]
    for kind in kinds:
        asked = (given_sizes, np.array(order, kind), seq_length, num_samples, num_tokens, extra, wide)
        found = outcome(index.IMPLEMENTATIONS["C++"], "sample_index", *asked)
        if (num_samples + 1) * seq_length >= 2**63:
            assert found is None
        else:
            assert found == outcome(_numpy_index, "sample_index", *asked)


@native
@given(
    data=st.data(),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=9),
    seq_length=st.integers(1, 12),
    extra=st.integers(0, 1),
)
def test_fewer_or_more_samples_than_the_documents_hold(data, sizes, seq_length, extra):
    order = data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=40))
    tokens = sum(sizes[document] for document in order)
    assume(tokens > extra)
    num_samples = data.draw(st.integers(0, (tokens - extra) // seq_length + 2))
    asked = (
        np.array(sizes, np.int32),
        np.array(order, np.int32),
        seq_length,
        num_samples,
        tokens,
        extra,
        False,
    )
    found = outcome(index.IMPLEMENTATIONS["C++"], "sample_index", *asked)
    assert found == outcome(_numpy_index, "sample_index", *asked)
    assert (found is None) == (num_samples > (tokens - extra) // seq_length + 1)


@native
@given(
    pointers=st.lists(
        st.one_of(st.integers(-3, 9), st.sampled_from([2**62, 2**63 - 1, -(2**63)])), min_size=3, max_size=3
    ),
    sizes=st.lists(lengths, min_size=3, max_size=3),
    order=st.lists(st.integers(0, 3), max_size=5),
    span=st.tuples(*[st.one_of(st.integers(-1, 5), st.sampled_from([2**62, 2**63 - 1, -(2**63)]))] * 4),
    limit=st.one_of(st.integers(-1, 12), st.sampled_from([2**63 - 1, -(2**63)])),
    kind=st.sampled_from(["u1", "i1", "u2", "i2", "i4", "i8"]),
    length=st.integers(0, 9),
)
@example(pointers=[0, 0, 0], sizes=[2, 2, 2], order=[0], span=(0, 1, 0, 1), limit=0, kind="u2", length=0)
@example(pointers=[-1, 0, 0], sizes=[2, 2, 2], order=[0], span=(0, 0, 0, 2), limit=99, kind="i4", length=2)
@example(pointers=[4, 0, 0], sizes=[4, 2, 2], order=[0, 1], span=(0, 1, 1, 1), limit=9, kind="u1", length=4)
def test_gather_takes_what_the_twin_takes(pointers, sizes, order, span, limit, kind, length):
    tokens = np.array([1, 7, 3, 9, 5, 2, 8, 4], kind)
    found = []
    for impl in (index.IMPLEMENTATIONS["C++"], _numpy_index):
        out = np.zeros(length, np.int64)
        asked = (
            tokens,
            np.array(pointers, np.int64),
            np.array(sizes, np.int32),
            np.array(order, np.int32),
            *span,
            limit,
            out,
        )
        bad = outcome(impl, "gather", *asked)
        found.append((bad, None if bad is None else out.tolist()))
    assert found[0] == found[1]
