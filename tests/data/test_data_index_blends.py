"""Blending indices: equal to megatron-core's, and to a plain loop."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_hyperrouter.data.order import index

helpers = importlib.import_module("megatron.core.datasets.helpers")
gpt_dataset = importlib.import_module("megatron.core.datasets.gpt_dataset")

IMPLEMENTATIONS = sorted(index.IMPLEMENTATIONS.items())
native = pytest.mark.skipif("C++" not in index.IMPLEMENTATIONS, reason="the extension is not built")
every = pytest.mark.parametrize("impl", [pytest.param(impl, id=name) for name, impl in IMPLEMENTATIONS])

sizes_lists = st.lists(st.one_of(st.integers(0, 2), st.integers(0, 40)), min_size=1, max_size=30).filter(
    lambda sizes: sum(sizes) >= 2
)


def blend_by_loop(weights: list[float], limits: list[float], size: int) -> list[tuple[int, int]]:
    """The definition: the first set, not yet used up, that is furthest behind its share."""
    counts, picks = [0] * len(weights), []
    for t in range(size):
        live = [i for i in range(len(weights)) if counts[i] < limits[i]]
        chosen = max(live, key=lambda i: (weights[i] * max(float(t), 1.0) - counts[i], -i))
        picks.append((chosen, counts[chosen]))
        counts[chosen] += 1
    return picks


def megatron_blend(weights: list[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    sets, samples = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(sets, samples, np.array(weights), len(weights), size, False)
    return sets, samples


@every
@given(
    weights=st.lists(
        st.one_of(st.sampled_from([0.25, 0.5, 1.0]), st.floats(1e-4, 1.0)), min_size=1, max_size=90
    ),
    size=st.integers(0, 150),
)
@example(weights=[0.125] * 8, size=80)  # nothing but ties
@example(weights=[1 / 97] * 97, size=300)
@example(weights=[1 / 3, 1 / 3, 1 / 3], size=100)
def test_blending_indices_are_megatron_cores(impl, weights, size):
    sets, samples = index.blending_indices(weights, size, impl=impl)
    assert sets.dtype == np.int16 and samples.dtype == np.int64
    assert list(zip(sets.tolist(), samples.tolist(), strict=True)) == blend_by_loop(
        weights, [np.inf] * len(weights), size
    )
    for found, expected in zip((sets, samples), megatron_blend(weights, size), strict=True):
        np.testing.assert_array_equal(found, expected)


@every
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=80))
@example(sizes=[3] * 70)
@example(sizes=[1, 1, 1, 200])
@example(sizes=[*range(1, 40), 2000, *range(40, 1, -1)])
def test_exhaustive_blending_indices_are_megatron_cores(impl, sizes):
    sets, samples = index.exhaustive_blending_indices(sizes, impl=impl)
    expected_sets, expected_samples = np.zeros(sum(sizes), np.int16), np.zeros(sum(sizes), np.int64)
    helpers.build_exhaustive_blending_indices(
        expected_sets, expected_samples, np.array(sizes, np.int64), len(sizes)
    )
    np.testing.assert_array_equal(sets, expected_sets)
    np.testing.assert_array_equal(samples, expected_samples)
    assert sorted(zip(sets.tolist(), samples.tolist(), strict=True)) == [
        (i, n) for i, size in enumerate(sizes) for n in range(size)
    ]


@every
@pytest.mark.parametrize("sizes", [[0, 3, 0, 0, 2, 0], [0, 2, 2], [0] * 70 + [1, 2]])
def test_a_set_without_samples_is_never_picked(impl, sizes):
    """megatron-core's helper would write past its arrays here."""
    sets, samples = index.exhaustive_blending_indices(sizes, impl=impl)
    picks = blend_by_loop([size / sum(sizes) for size in sizes], sizes, sum(sizes))
    assert list(zip(sets.tolist(), samples.tolist(), strict=True)) == picks


@every
def test_no_samples_at_all_make_an_empty_blend(impl):
    assert all(len(array) == 0 for array in index.exhaustive_blending_indices([0, 0], impl=impl))


@every
def test_many_sets_and_many_samples_in_every_implementation(impl):
    random = np.random.default_rng(0)
    weights = random.random(300) + 0.01
    weights /= weights.sum()
    for found, expected in zip(
        index.blending_indices(weights, 5000, impl=impl), megatron_blend(weights.tolist(), 5000), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@native
@pytest.mark.parametrize("kind", ["equal", "random", "few heavy", "one heavy", "not normalised", "tiny sum"])
@pytest.mark.parametrize("count", [16, 17, 64, 200])
def test_what_the_candidates_leave_out_is_never_furthest_behind(kind, count):
    """The extension looks at a few sets only; the weights here make their number grow, shrink and run out."""
    random = np.random.default_rng(count)
    weights = {
        "equal": np.full(count, 1 / count),
        "random": random.random(count) + 0.01,
        "few heavy": 1 / np.arange(1, count + 1) ** 1.5,
        "one heavy": np.r_[np.full(count - 1, 1e-4), 1.0],
        "not normalised": random.random(count) * 50 + 1,
        "tiny sum": np.full(count, 1e-9) * random.random(count) + 1e-12,
    }[kind]
    if kind in ("random", "few heavy", "one heavy"):
        weights /= weights.sum()
    for found, expected in zip(
        index.blending_indices(weights, 60_000), megatron_blend(weights.tolist(), 60_000), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@every
@pytest.mark.parametrize("weights", [[], [0.5, 0.0], [0.5, -1.0], [np.nan], [np.inf], [1e-6] * 32768])
def test_weights_that_make_no_blend_are_refused(impl, weights):
    with pytest.raises(ValueError, match="weights"):
        index.blending_indices(weights, 3, impl=impl)


@every
@pytest.mark.parametrize("sizes", [[], [3, -1], [1] * 32768])
def test_sizes_that_make_no_blend_are_refused(impl, sizes):
    with pytest.raises(ValueError, match="sizes"):
        index.exhaustive_blending_indices(np.array(sizes, np.int64), impl=impl)


@every
def test_a_negative_number_of_samples_is_refused(impl):
    with pytest.raises(ValueError, match="size must be at least 0, got -1"):
        index.blending_indices([1.0], -1, impl=impl)
