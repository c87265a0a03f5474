"""--data-path and --split mean what they mean to megatron-core."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hyperrouter.data.order import blend
from megatron_hyperrouter.data.order.blend import Blend, blend_sizes, normalise, parse_blend, split_documents
from megatron_hyperrouter.errors import ConfigError

utils = importlib.import_module("megatron.core.datasets.utils")
config = importlib.import_module("megatron.core.datasets.blended_megatron_dataset_config")
builder = importlib.import_module("megatron.core.datasets.blended_megatron_dataset_builder")

weights_lists = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20)


@given(weights=weights_lists)
def test_weights_and_prefixes_alternate(weights):
    words = [word for i, weight in enumerate(weights) for word in (repr(weight), f" data/{i} ")]
    prefixes, numbers = utils.get_blend_from_list(words)
    assert parse_blend(words, flag="--data-path") == Blend(tuple(prefixes), tuple(utils.normalize(numbers)))


def test_weights_after_the_prefixes_are_refused():
    """megatron-core takes the weights for prefixes, and finds no such files."""
    words = ["a", "1", "b", "2"]
    assert utils.get_blend_from_list(words) == (words, None)
    with pytest.raises(ConfigError, match="must have each weight before its prefix"):
        parse_blend(words, flag="--data-path")


@pytest.mark.parametrize("words", [["a"], ["a", "b"], ["a", "b", "c"], ["7"]])
def test_prefixes_alone_have_no_weights(words):
    prefixes, numbers = utils.get_blend_from_list(words)
    assert (
        list(parse_blend(words, flag="--data-path").prefixes),
        parse_blend(words, flag="--data-path").weights,
    ) == (prefixes, numbers)


@pytest.mark.parametrize(
    "words",
    [
        ["0.3", "a", "0.7"],
        ["0.3", "a", "b", "0.7"],
        ["0", "a", "1", "b"],
        ["-1", "a"],
        ["nan", "a"],
        ["inf", "a"],
        ["a", "b", "1", "c"],
    ],
)
def test_a_blend_that_is_neither_is_refused(words):
    with pytest.raises(ConfigError, match="--valid-data-path") as caught:
        parse_blend(words, flag="--valid-data-path")
    assert " ".join(words) in str(caught.value)


@given(weights=weights_lists)
def test_normalising_rounds_as_megatron_core_does(weights):
    assert list(normalise(weights)) == utils.normalize(weights)
    assert list(normalise(normalise(weights))) == utils.normalize(utils.normalize(weights))


@given(
    shares=st.lists(
        st.one_of(st.integers(0, 1000), st.decimals(0, 1, places=4)), min_size=1, max_size=3
    ).filter(any),
    documents=st.integers(0, 5000),
)
def test_split_documents_are_megatron_cores(shares, documents):
    split = ",".join(map(str, shares))
    matrix = config.convert_split_vector_to_split_matrix(config.parse_and_normalize_split(split))
    for found, bounds in zip(split_documents(split, documents), matrix, strict=True):
        if bounds is None:
            assert not found
        else:  # as in BlendedMegatronDatasetBuilder._build_megatron_dataset_splits
            begin, end = (round(bound * float(documents)) for bound in bounds)
            assert list(found) == np.arange(begin, end).tolist()


def test_a_split_covers_every_document_once():
    train, valid, test = split_documents("969,30,1", 1000)
    assert (train, valid, test) == (range(969), range(969, 999), range(999, 1000))


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0"])
def test_a_split_that_is_none_is_refused(split):
    with pytest.raises(ConfigError, match="--split"):
        split_documents(split, 10)


@given(weights=weights_lists, num_samples=st.integers(1, 100_000))
def test_blend_sizes_are_megatron_cores(weights, num_samples):
    weights = normalise(weights)
    size, built = blend_sizes(weights, num_samples)
    assert size == sum(sizes[0] for sizes in builder._get_size_per_split_per_dataset(weights, [num_samples]))
    assert list(built) == [
        sizes[0] for sizes in builder._get_size_per_split_per_dataset(weights, [num_samples], surplus=0.005)
    ]


def test_set_counts_in_pieces(monkeypatch):
    sets = np.random.default_rng(0).integers(0, 5, 1000).astype(np.int16)
    expected = [int((sets == number).sum()) for number in range(7)]
    for piece in (1, 7, 1000, 2000):
        monkeypatch.setattr(blend, "_PIECE", piece)
        assert blend.set_counts(sets, 7) == expected
    assert blend.set_counts(sets[:0], 2) == [0, 0]
