"""Datasets hold megatron-core's samples in megatron-core's order; unusable data is refused with file, place
and remedy.
"""

from __future__ import annotations

import importlib
import re

import numpy as np
import pytest
from corpora import megatron_datasets, megatron_sample, write_corpus

from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.order import index
from megatron_hyperrouter.data.order.blend import blend_sizes, normalise
from megatron_hyperrouter.data.order.index_files import IndexCache
from megatron_hyperrouter.data.store.token_files import IndexedDataset
from megatron_hyperrouter.data.stream import stores
from megatron_hyperrouter.data.stream.dataset import BlendedDataset, SequenceDataset, Splits, build_splits
from megatron_hyperrouter.errors import ConfigError, DataError

gpt_dataset = importlib.import_module("megatron.core.datasets.gpt_dataset")

every = pytest.mark.parametrize(
    "impl", [pytest.param(impl, id=name) for name, impl in sorted(index.IMPLEMENTATIONS.items())]
)

SEQ_LENGTH, SEED = 16, 1234


def sizes_of(count: int, seed: int) -> list[int]:
    """Many short documents, among them empty ones and ones of a single token, and some longer than several
    samples.
    """
    random = np.random.default_rng(seed)
    return [int(size) for size in random.choice([0, 1, 2, 5, 17, 40, 90], count)]


def ours(data: DataConfig, samples: tuple[int | None, ...], **other) -> Splits:
    train, valid, test = samples
    arguments = {"seq_length": SEQ_LENGTH, "seed": SEED, "vocab_size": 1000} | other
    return build_splits(data, train_samples=train, valid_samples=valid, test_samples=test, **arguments)


def assert_same(found, expected) -> None:
    """The same samples in the same order, and for one file the same indices."""
    assert len(found) == len(expected)
    if isinstance(found, SequenceDataset):
        for name in ("document_index", "sample_index", "shuffle_index"):
            np.testing.assert_array_equal(getattr(found.order, name), getattr(expected, name))
    else:
        assert isinstance(found, BlendedDataset)
        np.testing.assert_array_equal(found.dataset_index, expected.dataset_index)
        np.testing.assert_array_equal(found.sample_index, expected.dataset_sample_index)
    for i in range(len(found)):
        sample = found[i]
        assert sample.dtype == np.int64 and sample.shape == (SEQ_LENGTH + 1,)
        np.testing.assert_array_equal(sample, megatron_sample(expected, i))


# ---- one file ----


@every
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize(
    "samples",
    [
        (None, None, None),  # one epoch each
        (5, 3, 2),  # less than one epoch
        (400, 60, 30),  # many epochs
        (200, 31, 27),
    ],
)
def test_one_file_is_megatron_cores(tmp_path, impl, dtype, samples):
    prefix = write_corpus(tmp_path / "corpus", sizes_of(150, seed=1), dtype=dtype)
    found = ours(DataConfig(data_path=(prefix,), split="80,12,8"), samples, impl=impl)
    expected = megatron_datasets(
        samples, seq_length=SEQ_LENGTH, seed=SEED, blend=([prefix], None), split="80,12,8"
    )
    for mine, theirs in zip((found.train, found.valid, found.test), expected, strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize(("share_of_last_epoch", "separate"), [(0.1, True), (0.5, True), (0.9, False)])
def test_the_last_epoch_by_itself_and_with_the_others(tmp_path, share_of_last_epoch, separate):
    sizes = sizes_of(60, seed=2)
    prefix = write_corpus(tmp_path / "corpus", sizes)
    per_epoch = sum(sizes) // SEQ_LENGTH
    samples = (2 * per_epoch + int(share_of_last_epoch * per_epoch), 0, 0)
    found = ours(DataConfig(train_data_path=(prefix,)), samples).train
    expected = megatron_datasets(
        samples, seq_length=SEQ_LENGTH, seed=SEED, blend_per_split=[([prefix], None), None, None]
    )[0]
    assert_same(found, expected)
    last = set(found.order.document_index[-len(sizes) :].tolist()) == set(range(len(sizes)))
    assert last == separate, (
        "the last epoch of documents is a whole one exactly where it is shuffled by itself"
    )


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("seq_length", [1, 2, 100])
def test_every_seed_and_length_is_megatron_cores(tmp_path, seed, seq_length):
    prefix = write_corpus(tmp_path / "corpus", sizes_of(60, seed=3))
    found = ours(DataConfig(train_data_path=(prefix,)), (30, 0, 0), seed=seed, seq_length=seq_length).train
    expected = megatron_datasets(
        (30, 0, 0), seq_length=seq_length, seed=seed, blend_per_split=[([prefix], None), None, None]
    )[0]
    for i in range(len(expected)):
        np.testing.assert_array_equal(found[i], megatron_sample(expected, i))


def test_a_file_of_megatron_cores_writer_with_several_sequences_a_document(tmp_path):
    indexed = importlib.import_module("megatron.core.datasets.indexed_dataset")
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "corpus.bin"), dtype=np.int32)
    random = np.random.default_rng(0)
    for lengths in ([20, 3, 0], [], [31], [9, 9, 9]):
        builder.add_document(random.integers(0, 1000, sum(lengths)), lengths)
    builder.finalize(str(tmp_path / "corpus.idx"))
    prefix = str(tmp_path / "corpus")
    found = ours(DataConfig(train_data_path=(prefix,)), (11, 0, 0)).train
    assert_same(
        found,
        megatron_datasets(
            (11, 0, 0), seq_length=SEQ_LENGTH, seed=SEED, blend_per_split=[([prefix], None), None, None]
        )[0],
    )


# ---- blends ----


@pytest.fixture
def three(tmp_path) -> list[str]:
    return [
        write_corpus(tmp_path / name, sizes_of(count, seed=count), seed=count)
        for name, count in (("a", 80), ("b", 150), ("c", 60))
    ]


@every
@pytest.mark.parametrize("weights", [(0.3, 0.5, 0.2), (1.0, 1.0, 1.0), (70.0, 1.0, 29.0)])
@pytest.mark.parametrize("samples", [(150, 20, 10), (1000, 100, 1)])
def test_a_blend_with_weights_is_megatron_cores(three, impl, weights, samples):
    words = tuple(
        word for weight, prefix in zip(weights, three, strict=True) for word in (str(weight), prefix)
    )
    found = ours(DataConfig(data_path=words, split="6,2,2"), samples, impl=impl)
    expected = megatron_datasets(
        samples, seq_length=SEQ_LENGTH, seed=SEED, blend=(three, list(weights)), split="6,2,2"
    )
    for mine, theirs in zip((found.train, found.valid, found.test), expected, strict=True):
        assert_same(mine, theirs)


@every
@pytest.mark.parametrize("samples", [(None, None, None), (50, 10, 4), (1, 1, 1)])
def test_a_blend_without_weights_is_megatron_cores(three, impl, samples):
    found = ours(DataConfig(data_path=tuple(three), split="6,2,2"), samples, impl=impl)
    expected = megatron_datasets(
        samples, seq_length=SEQ_LENGTH, seed=SEED, blend=(three, None), split="6,2,2"
    )
    for mine, theirs in zip((found.train, found.valid, found.test), expected, strict=True):
        assert_same(mine, theirs)


def test_a_blend_without_weights_may_be_used_up(three):
    whole = len(ours(DataConfig(train_data_path=tuple(three)), (None, 0, 0)).train)
    found = ours(DataConfig(train_data_path=tuple(three)), (whole, 0, 0)).train
    expected = megatron_datasets(
        (whole, 0, 0), seq_length=SEQ_LENGTH, seed=SEED, blend_per_split=[(three, None), None, None]
    )[0]
    assert_same(found, expected)


def test_weights_are_rounded_as_often_as_megatron_core_rounds_them(tmp_path):
    """It divides them by their sum twice, which changes the last bit and with it who wins a tie."""
    weights = [8.0, 7.0, 7.0, 1.0, 11.0, 3.0]
    once = normalise(weights)
    assert (index.blending_indices(once, 60)[0] != index.blending_indices(normalise(once), 60)[0]).any()
    prefixes = [write_corpus(tmp_path / str(i), [40] * 10, seed=i) for i in range(6)]
    words = tuple(
        word for weight, prefix in zip(weights, prefixes, strict=True) for word in (str(weight), prefix)
    )
    found = ours(DataConfig(train_data_path=words), (60, 0, 0)).train
    expected = megatron_datasets(
        (60, 0, 0), seq_length=SEQ_LENGTH, seed=SEED, blend_per_split=[(prefixes, weights), None, None]
    )[0]
    assert_same(found, expected)


def test_each_split_may_have_files_of_its_own(three):
    a, b, c = three
    samples = (300, 40, 7)
    data = DataConfig(train_data_path=("0.9", a, "0.1", b), valid_data_path=(b, c), test_data_path=("2.0", c))
    expected = megatron_datasets(
        samples,
        seq_length=SEQ_LENGTH,
        seed=SEED,
        blend_per_split=[([a, b], [0.9, 0.1]), ([b, c], None), ([c], [2.0])],
    )
    found = ours(data, samples)
    for mine, theirs in zip((found.train, found.valid, found.test), expected, strict=True):
        assert_same(mine, theirs)
    assert isinstance(found.test, SequenceDataset)


def test_one_prefix_with_a_weight_is_megatron_cores_blend_of_one(three):
    found = ours(DataConfig(data_path=("1.0", three[0]), split="1"), (200, 0, 0)).train
    expected = megatron_datasets(
        (200, 0, 0), seq_length=SEQ_LENGTH, seed=SEED, blend=([three[0]], [1.0]), split="1,0,0"
    )[0]
    assert isinstance(found, BlendedDataset)
    assert_same(found, expected)


def test_a_blend_without_weights_goes_on_after_one_epoch(three):
    """megatron-core would come to an end of samples; ours repeats the files in the same shares."""
    once = ours(DataConfig(train_data_path=tuple(three)), (None, 0, 0)).train
    lengths = [len(part) for part in once.datasets]
    more = ours(DataConfig(train_data_path=tuple(three)), (3 * len(once), 0, 0)).train
    assert 3 * len(once) <= len(more) <= 3 * len(once) + len(three)
    counts = np.bincount(more.dataset_index, minlength=3)
    assert all(abs(count - 3 * length) <= 2 for count, length in zip(counts, lengths, strict=True))
    assert all(len(more[i]) == SEQ_LENGTH + 1 for i in range(len(more)))


def test_a_set_never_runs_out_of_samples(tmp_path):
    """A blend of many sets can draw more from one than its part and the surplus of 0.5 %; megatron-core gives
    up there.
    """
    weights = np.random.default_rng(5).random(60) ** 3 + 1e-3
    prefixes = [write_corpus(tmp_path / str(i), [SEQ_LENGTH + 1], seed=i) for i in range(60)]
    words = [word for weight, prefix in zip(weights, prefixes, strict=True) for word in (str(weight), prefix)]
    blend = ours(DataConfig(train_data_path=tuple(words)), (100, 0, 0)).train
    drawn = np.bincount(blend.dataset_index, minlength=60)
    assert (drawn > blend_sizes(normalise(weights), 100)[1]).any()
    assert all(len(part) >= count for part, count in zip(blend.datasets, drawn, strict=True))
    for i in range(len(blend)):
        assert len(blend[i]) == SEQ_LENGTH + 1


def test_a_file_in_several_splits_is_opened_once(three, monkeypatch):
    opened = []

    def counting(prefix, **how):
        opened.append(prefix)
        return IndexedDataset(prefix, **how)

    monkeypatch.setattr(stores, "IndexedDataset", counting)
    ours(DataConfig(data_path=tuple(three), split="6,2,2"), (5, 5, 5))
    assert opened == three


# ---- what is asked for, and what is there ----


def test_splits_without_samples_or_documents_are_none(tmp_path):
    prefix = write_corpus(tmp_path / "corpus", [40] * 10)
    found = ours(DataConfig(data_path=(prefix,), split="969,30,1"), (5, 5, 5))
    assert isinstance(found.train, SequenceDataset) and found.valid is None and found.test is None
    found = ours(DataConfig(data_path=(prefix,), split="5,5,0"), (5, 0, 5))
    assert found.valid is None and found.test is None
    found = ours(DataConfig(train_data_path=(prefix,)), (5, 5, 5))
    assert found.valid is None and found.test is None


@pytest.mark.parametrize("i", [-1, 1000])
def test_a_sample_that_is_not_there_is_refused(three, i):
    for words in ((three[0],), tuple(three)):
        data = ours(DataConfig(train_data_path=words), (20, 0, 0)).train
        with pytest.raises(IndexError, match=f"sample {i}"):
            data[i]


def test_no_training_data_is_refused():
    with pytest.raises(ConfigError, match="--train-data-path"):
        ours(DataConfig(valid_data_path=("a",)), (1, 1, 1))


def test_a_blend_with_weights_needs_a_number_of_samples(three):
    with pytest.raises(ValueError, match="num_samples must be given"):
        ours(DataConfig(train_data_path=("1", three[0], "2", three[1])), (None, 0, 0))


def test_an_empty_corpus_is_refused(tmp_path):
    prefix = write_corpus(tmp_path / "corpus", [])
    for data in (
        DataConfig(data_path=(prefix,)),
        DataConfig(train_data_path=(prefix,)),
        DataConfig(train_data_path=(prefix, prefix)),
    ):
        with pytest.raises(
            DataError, match=re.escape(f"{prefix}.idx: the corpus has no documents")
        ) as caught:
            ours(data, (5, 5, 5))
        assert "preprocess" in caught.value.remedy


@pytest.mark.parametrize("sizes", [[16], [4, 4, 4, 4], [0]])
def test_a_sequence_longer_than_the_data_is_refused(tmp_path, sizes):
    prefix = write_corpus(tmp_path / "corpus", sizes)
    expected = (
        rf"{prefix}.bin: the train split has {len(sizes)} of the {len(sizes)} documents, with "
        rf"{sum(sizes)} tokens"
    )
    with pytest.raises(DataError, match=re.escape(expected)) as caught:
        ours(DataConfig(train_data_path=(prefix,)), (5, 0, 0))
    assert "--seq-length 16" in caught.value.message and "17" in caught.value.message
    assert "--seq-length" in caught.value.remedy


def test_an_index_larger_than_the_memory_is_refused_before_it_is_built(tmp_path, monkeypatch):
    """A run "without an end" over a small file: 1,000 samples of 16 tokens are 161 epochs of 100 tokens."""
    prefix = write_corpus(tmp_path / "corpus", [50, 50])
    needed = 4 * 161 * 2 + 8 * (161 * 100 // 16)
    for present, refused in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": present, "SC_PAGE_SIZE": 1}.__getitem__)
        if not refused:
            assert len(ours(DataConfig(train_data_path=(prefix,)), (1000, 0, 0)).train) >= 1000
            continue
        with pytest.raises(DataError, match="the run needs 161 epochs of this file") as caught:
            ours(DataConfig(train_data_path=(prefix,)), (1000, 0, 0))
        assert "--data-index on-demand" in caught.value.remedy
    on_demand = DataConfig(train_data_path=(prefix,), data_index="on-demand")
    assert len(ours(on_demand, (10**15, 0, 0)).train) >= 10**15


def test_an_index_that_another_machine_has_built_needs_no_memory(tmp_path, monkeypatch):
    """``mhr index`` on a larger machine: the file is mapped."""
    data = DataConfig(train_data_path=(write_corpus(tmp_path / "corpus", [50, 50]),))
    made = ours(data, (1000, 0, 0), cache=IndexCache(cached_from=0)).train
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 1}.__getitem__)
    found = ours(data, (1000, 0, 0), cache=IndexCache(cached_from=0)).train
    np.testing.assert_array_equal(found.order.sample_index, made.order.sample_index)
    with pytest.raises(DataError, match="the run needs 321 epochs"):
        ours(data, (2000, 0, 0), cache=IndexCache(cached_from=0))
    left = {path.suffix for path in (tmp_path / "cache" / "hyperrouter").iterdir()}
    assert left == {".index", ".lock"}


def test_the_shortest_data_that_will_do(tmp_path):
    prefix = write_corpus(tmp_path / "corpus", [9, 8])
    found = ours(DataConfig(train_data_path=(prefix,)), (None, 0, 0)).train
    assert len(found) == 1
    assert sorted(found[0].tolist()) == sorted(IndexedDataset(prefix).tokens.tolist())


def test_a_split_shorter_than_a_sequence_is_named(tmp_path):
    prefix = write_corpus(tmp_path / "corpus", [40] * 9 + [10])
    with pytest.raises(
        DataError, match=r"the valid split has 1 of the 10 documents, with 10 tokens.*needs 17"
    ) as caught:
        ours(DataConfig(data_path=(prefix,), split="90,10,0"), (5, 5, 0))
    assert "--split" in caught.value.remedy


def test_a_file_of_a_blend_without_documents_in_a_split_is_named(tmp_path):
    small, large = write_corpus(tmp_path / "small", [40] * 2), write_corpus(tmp_path / "large", [40] * 100)
    with pytest.raises(DataError, match=re.escape(f"{small}.bin: the valid split has 0 of the 2 documents")):
        ours(DataConfig(data_path=(small, large), split="90,10,0"), (5, 5, 0))


@every
@pytest.mark.parametrize(
    ("dtype", "token"), [(np.uint16, 1000), (np.uint16, 65_535), (np.int32, 2**31 - 1), (np.int32, -1)]
)
def test_a_token_id_beyond_the_vocabulary_is_named(tmp_path, impl, dtype, token):
    sizes = [30, 0, 5, 40, 1, 25]
    prefix = write_corpus(tmp_path / "corpus", sizes, dtype=dtype)
    whole = np.fromfile(f"{prefix}.bin", dtype)
    found = 0
    for at, document in enumerate(np.repeat(range(len(sizes)), sizes)):
        content = whole.copy()
        content[at] = token
        content.tofile(f"{prefix}.bin")
        data = ours(DataConfig(train_data_path=(prefix,)), (6, 0, 0), impl=impl).train
        for i in range(len(data)):
            try:
                assert data[i].max() < 1000
            except DataError as error:
                found += 1
                place = (
                    f"{prefix}.bin, byte {at * np.dtype(dtype).itemsize}, document {document}: token id "
                    f"{token}"
                )
                assert error.message.startswith(f"{place} is outside the vocabulary"), error.message
                assert error.message.endswith("has the ids 0 to 999")
                assert "--tokenizer-model" in error.remedy
    assert found == len(data) * (SEQ_LENGTH + 1), "each token of each sample, the last label too"


def test_the_largest_id_of_the_vocabulary_is_fine(tmp_path):
    prefix = write_corpus(tmp_path / "corpus", [50], vocab_size=1)
    content = np.full(50, 999, np.uint16)
    content.tofile(f"{prefix}.bin")
    assert ours(DataConfig(train_data_path=(prefix,)), (2, 0, 0)).train[0].tolist() == [999] * 17
