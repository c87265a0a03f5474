"""Keyed permutations: C++ and the NumPy twin give the same one, which holds each number once and looks
random.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_hyperrouter.data.order import index

IMPLEMENTATIONS = sorted(index.IMPLEMENTATIONS.items())
native = pytest.mark.skipif("C++" not in index.IMPLEMENTATIONS, reason="the extension is not built")
every = pytest.mark.parametrize("impl", [pytest.param(impl, id=name) for name, impl in IMPLEMENTATIONS])
keys = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**63, 2**64 - 1]))


@every
@given(size=st.one_of(st.integers(1, 70), st.integers(1, 5000)), key=keys)
@example(size=4096, key=0)
@example(size=4097, key=0)
def test_a_keyed_permutation_holds_each_number_once_in_every_implementation(impl, size, key):
    found = impl.permutation(size, key)
    assert found.dtype == np.int64 and sorted(found.tolist()) == list(range(size))
    for _, other in IMPLEMENTATIONS:
        np.testing.assert_array_equal(other.permutation(size, key), found)
    for position in {0, size // 2, size - 1}:
        assert impl.permuted(position, size, key) == found[position]


@native
@given(size=st.integers(2**31, 2**62), key=keys, share=st.floats(0, 1))
@example(size=2**62, key=0, share=1.0)
@example(size=2**62 - 1, key=2**64 - 1, share=1.0)
def test_permutations_of_huge_sizes_are_the_same_in_every_implementation(size, key, share):
    position = min(int(share * size), size - 1)
    (found,) = {impl.permuted(position, size, key) for _, impl in IMPLEMENTATIONS}
    assert 0 <= found < size


def test_every_key_names_another_permutation_and_every_place_gets_every_number():
    """A chi-square of numbers over places: 99 % of random tables stay below 1155 with 32 x 32 - 2 x 32 + 1 =
    961 degrees of freedom.
    """
    size, draws = 32, 4000
    counts = np.zeros((size, size))
    for number in range(draws):
        counts[np.arange(size), index._numpy_index.permutation(size, index.key_of(number))] += 1
    assert ((counts - draws / size) ** 2 / (draws / size)).sum() < 1155
    assert (
        len({tuple(index._numpy_index.permutation(6, index.key_of(number))) for number in range(8000)}) > 690
    ), "of 720 orders"


def test_keys_change_with_every_number():
    found = [
        index.key_of(*numbers)
        for numbers in ((0,), (1,), (-1,), (0, 0), (0, 1), (1, 0), (2**40, 3), (2**64, 1))
    ]
    assert len(set(found)) == len(found) and all(0 <= key < 2**64 for key in found)


@every
@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_a_permutation_of_an_impossible_size_is_refused(impl, size):
    with pytest.raises(ValueError, match="size must be from 1 to"):
        impl.permutation(size, 0)
    with pytest.raises(ValueError, match="size must be from 1 to"):
        impl.permuted(0, size, 0)


@every
@pytest.mark.parametrize("position", [-1, 5])
def test_a_place_outside_a_permutation_is_refused(impl, position):
    with pytest.raises(IndexError, match=f"position {position} "):
        impl.permuted(position, 5, 0)
