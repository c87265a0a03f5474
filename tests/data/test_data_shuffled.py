"""The order of samples is that of megatron-core's GPTDataset, and reads each token of an epoch once."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_hyperrouter.data.order.shuffled import build_order, index

gpt_dataset = importlib.import_module("megatron.core.datasets.gpt_dataset")
utils = importlib.import_module("megatron.core.datasets.utils")

every = pytest.mark.parametrize(
    "impl", [pytest.param(impl, id=name) for name, impl in sorted(index.IMPLEMENTATIONS.items())]
)


def megatron_order(
    sizes: np.ndarray, documents: range, *, seq_length: int, num_samples: int | None, seed: int
) -> tuple[np.ndarray, ...]:
    """GPTDataset's three indices for documents of these sizes, without any file."""
    bare = object.__new__(gpt_dataset.GPTDataset)
    bare.config = SimpleNamespace(
        defer_npy_index_mmap=False,
        path_to_cache=None,
        mock=True,  # keeps it from writing a cache
        sequence_length=seq_length,
        add_extra_token_to_sequence=True,
        random_seed=seed,
        drop_last_partial_validation_sequence=True,
    )
    bare.dataset = SimpleNamespace(sequence_lengths=sizes)
    bare.indices = np.arange(documents.start, documents.stop, dtype=np.int32)
    bare.num_samples, bare.index_split = num_samples, utils.Split.train
    return bare._build_document_sample_shuffle_indices()


@every
@given(
    sizes=st.lists(st.one_of(st.integers(0, 2), st.integers(0, 60)), min_size=1, max_size=25),
    cut=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    seq_length=st.integers(1, 30),
    num_samples=st.one_of(st.none(), st.integers(1, 120)),
    seed=st.integers(0, 2**32 - 1),
)
@example(
    sizes=[11] * 10, cut=(0, 0), seq_length=10, num_samples=12, seed=1
)  # the last epoch hardly begins: by itself
@example(
    sizes=[11] * 10, cut=(0, 0), seq_length=10, num_samples=21, seed=1
)  # the last epoch is nearly whole: with the others
@example(
    sizes=[21] * 10, cut=(0, 0), seq_length=10, num_samples=35, seed=1
)  # 15 of 20 samples of the last epoch: by itself
@example(sizes=[21] * 10, cut=(0, 0), seq_length=10, num_samples=36, seed=1)  # 16 of 20: with the others
def test_the_order_is_megatron_cores(impl, sizes, cut, seq_length, num_samples, seed):
    sizes, documents = (
        np.array(sizes, np.int32),
        range(min(cut[0], len(sizes) - 1), max(len(sizes) - cut[1], 1)),
    )
    documents = range(documents.start, max(documents.stop, documents.start + 1))
    arguments = {"seq_length": seq_length, "num_samples": num_samples, "seed": seed}
    if sizes[documents.start : documents.stop].sum() < seq_length + 1:
        with pytest.raises(ValueError, match=f"one sample needs {seq_length + 1} tokens"):
            build_order(sizes, documents, **arguments, impl=impl)
        return
    found = build_order(sizes, documents, **arguments, impl=impl)
    expected = megatron_order(sizes, documents, **arguments)
    for ours, theirs in zip(
        (found.document_index, found.sample_index, found.shuffle_index), expected, strict=True
    ):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert len(found) == len(found.sample_index) - 1 >= (num_samples or 1)


def test_both_ways_to_shuffle_the_last_epoch_are_met():
    """The two examples above do differ: what they stand for is not tested by chance."""
    sizes = np.full(10, 11, np.int32)  # 110 tokens: 10 samples of 10 in the first epoch, 11 in the second
    few = build_order(sizes, range(10), seq_length=10, num_samples=12, seed=1)
    many = build_order(sizes, range(10), seq_length=10, num_samples=21, seed=1)
    assert len(few) == len(many) == 21
    assert sorted(few.shuffle_index[:10]) == list(range(10)), "the first epoch comes first"
    assert sorted(many.shuffle_index[:10]) != list(range(10)), "both epochs are mixed"


@every
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(lambda sizes: sum(sizes) > 10),
    epochs=st.integers(1, 4),
)
def test_each_token_is_read_once_an_epoch(impl, sizes, epochs):
    total, seq_length = sum(sizes), 7
    order = build_order(
        np.array(sizes, np.int32),
        range(len(sizes)),
        seq_length=seq_length,
        num_samples=(epochs * total - 1) // seq_length,
        seed=3,
        impl=impl,
    )
    read = np.zeros(total, int)
    begins = np.concatenate([[0], np.cumsum(sizes)])
    for i in range(len(order)):
        documents, first, begin, last, end = order.span(i)
        for position in range(first, last + 1):
            document = documents[position]
            low = begin if position == first else 0
            high = end if position == last else sizes[document]
            if position == last:
                high -= 1  # the last token is but a label here; as an input it belongs to the next sample
            read[begins[document] + low : begins[document] + high] += 1
    rest = epochs * total - len(order) * seq_length  # tokens too few for one more sample
    assert 1 <= rest <= seq_length
    assert read.sum() == epochs * total - rest and read.max() <= epochs and (epochs - read).sum() == rest


@pytest.mark.parametrize("i", [-1, 4])
def test_a_sample_that_is_not_there_is_refused(i):
    order = build_order(np.array([9], np.int32), range(1), seq_length=2, num_samples=None, seed=0)
    assert len(order) == 4
    with pytest.raises(IndexError, match=f"sample {i} is out of range: there are 4"):
        order.span(i)
