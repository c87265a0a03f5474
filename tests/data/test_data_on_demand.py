"""The on-demand order reads each token once per epoch, equals the order that plain lists give, and starts at
once.
"""

from __future__ import annotations

import itertools
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from corpora import write_corpus
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.order import _numpy_index, index
from megatron_hyperrouter.data.order.on_demand import OnDemandOrder
from megatron_hyperrouter.data.store.token_files import IndexedDataset
from megatron_hyperrouter.data.stream import dataset
from megatron_hyperrouter.data.stream.dataset import SequenceDataset, build_splits
from megatron_hyperrouter.errors import DataError

every = pytest.mark.parametrize(
    "impl", [pytest.param(impl, id=name) for name, impl in sorted(index.IMPLEMENTATIONS.items())]
)
in_tmp_path = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)


class Sizes:
    """A store whose tokens are their own positions: only what an order asks of one."""

    idx_path = bin_path = "made-up"

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = np.array(sizes, np.int32)
        self.dtype = np.dtype(np.int32)
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @property
    def pointers(self) -> np.ndarray:
        return 4 * self.starts[:-1]

    def first_tokens(self, sequences) -> np.ndarray:
        return self.starts[list(sequences)]

    def read_sequences(self, ranges) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for each in ranges:
            yield self.sizes[each.start : each.stop], self.pointers[each.start : each.stop]


def tokens_of(order: OnDemandOrder, store: Sizes, i: int) -> list[int]:
    """Sample ``i`` as positions in the file."""
    documents, first, begin, last, end = order.span(i)
    found = []
    for position in range(first, last + 1):
        document = documents[position]
        low, high = begin if position == first else 0, end if position == last else store.sizes[document]
        assert 0 <= low <= high <= store.sizes[document]
        found += range(store.starts[document] + low, store.starts[document] + high)
    return found


def materialised(
    sizes: list[int],
    documents: range,
    *,
    seq_length: int,
    epochs: int,
    one: bool,
    seed: int,
    block: int,
    region: int,
):
    """The same order as lists: the stream of ``epochs`` and a little of the next one, and its samples in
    reading order.
    """
    starts = np.concatenate([[0], np.cumsum(sizes)])
    blocks = [list(documents[i : i + block]) for i in range(0, len(documents), block)]
    stream, borders = [], [0]
    for epoch in range(epochs + 1 + seq_length):
        order = _numpy_index.permutation(len(blocks), index.key_of(seed, 0, epoch, 0))
        for number, at in enumerate(range(0, len(blocks), region)):
            chosen = [document for i in order[at : at + region] for document in blocks[i]]
            for i in _numpy_index.permutation(len(chosen), index.key_of(seed, 1, epoch, number)):
                stream += range(starts[chosen[i]], starts[chosen[i] + 1])
            borders.append((epoch, number, len(stream)))
    total = (len(stream) // (epochs + 1 + seq_length)) * epochs
    end = (total - 1) // seq_length if one else -(-total // seq_length)
    samples, first = [], 0
    for epoch, number, border in borders[1:]:
        until = min(-(-border // seq_length), end)
        if until > first:
            for i in _numpy_index.permutation(until - first, index.key_of(seed, 2, epoch, number)):
                begin = (first + int(i)) * seq_length
                samples.append(stream[begin : begin + seq_length + 1])
            first = until
    return samples


corpora = st.lists(st.one_of(st.integers(0, 2), st.integers(0, 40)), min_size=1, max_size=40)


@every
@given(
    sizes=corpora,
    cut=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    seq_length=st.integers(1, 30),
    epochs=st.integers(1, 3),
    one=st.booleans(),
    seed=st.integers(0, 2**64),
    block=st.integers(1, 6),
    region=st.integers(1, 4),
)
@example(
    sizes=[0] * 9 + [12] + [0] * 9, cut=(0, 0), seq_length=5, epochs=3, one=False, seed=0, block=1, region=1
)  # empty regions
@example(
    sizes=[2] * 30, cut=(0, 0), seq_length=30, epochs=2, one=False, seed=0, block=1, region=1
)  # samples over many regions
@example(sizes=[7, 6], cut=(0, 0), seq_length=12, epochs=3, one=False, seed=0, block=9, region=9)
@settings(deadline=None)
def test_the_order_is_that_of_its_materialised_twin_and_reads_each_token_once(
    impl, sizes, cut, seq_length, epochs, one, seed, block, region
):
    documents = range(
        min(cut[0], len(sizes) - 1), len(sizes) - min(cut[1], len(sizes) - 1 - min(cut[0], len(sizes) - 1))
    )
    store, tokens = Sizes(sizes), sum(sizes[documents.start : documents.stop])
    epochs = 1 if one else epochs
    arguments = {"seq_length": seq_length, "seed": seed, "block": block, "region": region}
    num_samples = None if one else max(-(-epochs * tokens // seq_length), 1)
    if tokens < seq_length + 1:
        with pytest.raises(ValueError, match=f"one sample needs {seq_length + 1} tokens"):
            OnDemandOrder(store, documents, num_samples=num_samples, impl=impl, **arguments)
        return
    order = OnDemandOrder(store, documents, num_samples=num_samples, impl=impl, **arguments)
    found = [tokens_of(order, store, i) for i in range(len(order))]
    assert found == materialised(sizes, documents, epochs=epochs, one=one, **arguments)

    read = np.bincount([token for sample in found for token in sample[:-1]], minlength=int(store.starts[-1]))
    assert read.sum() == len(found) * seq_length, (
        "a token is an input of one sample, and a label of the same or the one before"
    )
    inside = read[store.starts[documents.start] : store.starts[documents.stop]]
    assert read.sum() == inside.sum()
    if one:
        rest = tokens - len(found) * seq_length
        assert 1 <= rest <= seq_length and inside.max() <= 1 and (inside == 0).sum() == rest
    else:
        assert inside.min() >= epochs, (
            "each token once an epoch, and a few again: the last sample goes on in the next epoch"
        )
        assert inside.sum() - epochs * tokens < seq_length


@given(sizes=corpora.filter(lambda sizes: sum(sizes) > 8), more=st.integers(1, 40), seed=st.integers(0, 99))
@settings(deadline=None)
def test_a_longer_run_begins_like_a_shorter_one(sizes, more, seed):
    store = Sizes(sizes)
    short, long = (
        OnDemandOrder(store, range(len(sizes)), seq_length=7, num_samples=n, seed=seed, block=3, region=2)
        for n in (20, 20 + more)
    )
    assert (len(short), len(long)) == (20, 20 + more)
    assert [tokens_of(short, store, i) for i in range(20)] == [tokens_of(long, store, i) for i in range(20)]


def test_neighbours_change_from_epoch_to_epoch_and_come_from_all_over_the_file():
    count, block, region = 4000, 50, 20
    store = Sizes([1] * count)
    order = OnDemandOrder(
        store, range(count), seq_length=1, num_samples=3 * count, seed=5, block=block, region=region
    )
    epochs = [
        np.concatenate([order.region(epoch, number).documents for number in range(4)]) for epoch in range(3)
    ]
    pairs = [set(zip(documents[:-1].tolist(), documents[1:].tolist(), strict=True)) for documents in epochs]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert len(pairs[one] & pairs[other]) < 10, "of 3999 pairs; chance alone gives 1"
    near = np.mean(
        [abs(a - b) < block for documents in epochs for a, b in itertools.pairwise(documents.tolist())]
    )
    assert near < 0.12, "a twentieth of a region lies in the same block"


@pytest.mark.parametrize("i", [-1, 9])
def test_a_sample_that_is_not_there_is_refused(i):
    order = OnDemandOrder(Sizes([5, 5]), range(2), seq_length=1, num_samples=None, seed=0)
    with pytest.raises(IndexError, match=f"sample {i} is out of range: there are 9"):
        order.span(i)


def test_positions_beyond_64_bits_are_exact():
    store = Sizes([2**31 - 1] * 3)
    order = OnDemandOrder(store, range(3), seq_length=2**31, num_samples=2**62, seed=0)
    total = 3 * (2**31 - 1)
    i = 2**61 + 12345
    documents, first, begin, last, end = order.span(i)
    assert end - begin + sum(int(store.sizes[documents[k]]) for k in range(first, last)) == 2**31 + 1
    epoch = i * 2**31 // total
    assert set(documents.tolist()) <= {0, 1, 2} and len(order.epoch(epoch).blocks) == 1


def test_threads_make_each_shard_once(monkeypatch):
    store, made = Sizes([3] * 4000), []
    order = OnDemandOrder(store, range(4000), seq_length=10, num_samples=None, seed=0, block=100, region=10)
    make = order._make_region
    monkeypatch.setattr(order, "_make_region", lambda *which: made.append(which) or make(*which))
    barrier = threading.Barrier(8)

    def read(thread: int) -> list[list[int]]:
        barrier.wait(10)
        return [tokens_of(order, store, i) for i in range(200)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, range(8)))
    assert all(each == found[0] for each in found)
    assert made in ([(0, 0)], [(0, 0), (0, 1)]), "of 200 of 300 samples one may go on in the next region"


# ---- in a dataset ----


@in_tmp_path
@given(
    sizes=corpora.filter(lambda sizes: sum(sizes) >= 30),
    dtype=st.sampled_from([np.uint16, np.int32]),
    samples=st.integers(1, 60),
)
def test_a_dataset_reads_what_the_order_says(tmp_path, sizes, dtype, samples):
    prefix = write_corpus(tmp_path / "corpus", sizes, dtype=dtype)
    found = build_splits(
        DataConfig(train_data_path=(prefix,), data_index="on-demand"),
        seq_length=16,
        seed=3,
        vocab_size=1000,
        train_samples=samples,
        valid_samples=0,
        test_samples=0,
    ).train
    assert (
        isinstance(found, SequenceDataset)
        and isinstance(found.order, OnDemandOrder)
        and len(found) == samples
    )
    store, whole = Sizes(sizes), np.fromfile(f"{prefix}.bin", dtype)
    order = OnDemandOrder(store, range(len(sizes)), seq_length=16, num_samples=samples, seed=3)
    for i in range(samples):
        np.testing.assert_array_equal(found[i], whole[tokens_of(order, store, i)])


def splits_of(prefix: str, **settings):
    wanted = {"train_samples": 5, "valid_samples": 2, "test_samples": 0}
    return build_splits(
        DataConfig(data_path=(prefix,), split="8,2", **settings),
        seq_length=16,
        seed=3,
        vocab_size=1000,
        **wanted,
    )


def test_auto_decides_by_the_number_of_documents(tmp_path, monkeypatch):
    prefix = write_corpus(tmp_path / "corpus", [40] * 20)
    monkeypatch.setattr(dataset, "ON_DEMAND_FROM", 20)
    for kind, expected in (("auto", True), ("on-demand", True), ("materialised", False)):
        found = splits_of(prefix, data_index=kind)
        assert {isinstance(split.order, OnDemandOrder) for split in (found.train, found.valid)} == {expected}
    monkeypatch.setattr(dataset, "ON_DEMAND_FROM", 21)
    assert not isinstance(splits_of(prefix, data_index="auto").train.order, OnDemandOrder)


def test_a_split_too_short_is_named(tmp_path):
    prefix = write_corpus(tmp_path / "corpus", [40] * 9 + [5, 5])
    with pytest.raises(
        DataError, match=r"the valid split has 2 of the 11 documents, with 10 tokens.*needs 17"
    ):
        splits_of(prefix, data_index="on-demand")


@pytest.mark.parametrize(
    ("place", "number"), [(34 + 4 * 2, struct.pack("<i", 39)), (34 + 4 * 20 + 8 * 2, struct.pack("<q", 4))]
)
def test_documents_that_do_not_lie_one_after_another_are_refused(tmp_path, place, number):
    """Some tokens belong to two documents, and some to none."""
    prefix = write_corpus(tmp_path / "corpus", [40] * 20)
    with open(f"{prefix}.idx", "r+b") as stream:
        stream.seek(place)
        stream.write(number)
    found = splits_of(prefix, data_index="on-demand").train
    with pytest.raises(DataError, match="have 640 tokens in total") as caught:
        found[0]
    assert "--data-index materialised" in caught.value.remedy
    assert len(splits_of(prefix, data_index="materialised").train) >= 5


@pytest.mark.parametrize("start", [-2, 3, 2**40])
def test_a_start_that_cannot_be_is_refused_by_its_byte(tmp_path, start):
    prefix = write_corpus(tmp_path / "corpus", [40] * 20)
    place = 34 + 4 * 20 + 8 * 16  # where validation begins
    with open(f"{prefix}.idx", "r+b") as stream:
        stream.seek(place)
        stream.write(struct.pack("<q", start))
    with pytest.raises(
        DataError, match=f"corpus.idx, byte {place}: expected sequence 16 to start at a multiple"
    ):
        splits_of(prefix, data_index="on-demand")


def test_little_of_the_index_is_read_before_it_is_needed(tmp_path, monkeypatch):
    """The start of each block, and the sizes of one region."""
    store = IndexedDataset(write_corpus(tmp_path / "corpus", [40] * 4000), whole=False)
    asked: list[int] = []
    reader = store.first_tokens
    monkeypatch.setattr(store, "first_tokens", lambda sequences: asked.extend(sequences) or reader(asked))
    order = OnDemandOrder(store, range(4000), seq_length=16, num_samples=None, seed=0, block=100, region=4)
    order.span(0)
    assert asked == [*range(0, 4000, 100), 4000]


@pytest.mark.parametrize("fate", ["deleted", "replaced", "cut"])
def test_files_that_change_while_they_are_read(tmp_path, fate):
    """What was opened goes on being read, even under another name; what is no longer there is one message."""
    prefix = write_corpus(tmp_path / "corpus", [40] * 4000)
    orders = []
    for _ in range(2):
        store = IndexedDataset(prefix, whole=False)
        orders.append(
            OnDemandOrder(store, range(4000), seq_length=16, num_samples=None, seed=0, block=100, region=4)
        )
    expected = [orders[0].span(i) for i in range(1000)]
    if fate == "deleted":
        (tmp_path / "corpus.idx").unlink()
    elif fate == "replaced":
        write_corpus(tmp_path / "other", [5] * 32000)
        (tmp_path / "other.idx").replace(tmp_path / "corpus.idx")
    else:
        with open(tmp_path / "corpus.idx", "r+b") as stream:
            stream.truncate(9000)
        with pytest.raises(DataError, match=r"corpus\.idx, byte \d+: the file now ends here"):
            for i in range(1000):
                orders[1].span(i)
        return
    for span, wanted in zip((orders[1].span(i) for i in range(1000)), expected, strict=True):
        assert span[1:] == wanted[1:]
        np.testing.assert_array_equal(span.documents, wanted.documents)
