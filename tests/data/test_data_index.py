"""Indices: C++, the NumPy twin, megatron-core's helpers and plain loops give the same numbers."""

from __future__ import annotations

import importlib
import shutil
import sys
import threading
import time

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


@pytest.mark.skipif(not shutil.which("c++") and not shutil.which("g++"), reason="no C++ compiler")
def test_the_extension_is_built_where_it_can_be():
    assert index.implementation() == "C++", "build it with pip install -e . --no-build-isolation"


def test_the_twin_takes_over_where_no_extension_was_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron_hyperrouter.data._index", None)
    monkeypatch.delattr("megatron_hyperrouter.data._index", raising=False)
    assert list(index._available()) == ["NumPy"]


def shuffled(sizes: list[int], epochs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.tile(np.arange(len(sizes), dtype=np.int32), epochs)
    np.random.RandomState(seed).shuffle(order)
    return np.array(sizes, np.int32), order


# ---- sample index ----


@every
@given(
    sizes=sizes_lists,
    epochs=st.integers(1, 4),
    seq_length=st.integers(1, 50),
    drop_last=st.booleans(),
    extra=st.integers(0, 1),
    seed=st.integers(0, 99),
)
@example(sizes=[0, 5, 0, 1, 1, 0, 9], epochs=1, seq_length=3, drop_last=True, extra=1, seed=0)
@example(sizes=[4, 4], epochs=1, seq_length=4, drop_last=False, extra=0, seed=0)
def test_sample_index_is_megatron_cores_and_cuts_the_stream_evenly(
    impl, sizes, epochs, seq_length, drop_last, extra, seed
):
    sizes, order = shuffled(sizes, epochs, seed)
    per_epoch = int(sizes.sum())
    ours = index.sample_index(sizes, order, seq_length, epochs, per_epoch, drop_last, extra, impl=impl)
    assert ours.dtype == np.int32 and ours.flags.c_contiguous
    raw = helpers.build_sample_idx_int32(sizes, order, seq_length, epochs, per_epoch, drop_last, extra)
    partial = (epochs * per_epoch - extra) % seq_length != 0 and not drop_last
    if partial and extra and sizes[order[-1]] == 0:  # there megatron-core ends at token -1
        np.testing.assert_array_equal(ours[:-1], raw[:-1])
        assert (
            raw[-1, 1] == -1
            and ours[-1, 1] == sizes[order[ours[-1, 0]]] - 1
            and not sizes[order[ours[-1, 0] + 1 :]].any()
        )
    else:
        np.testing.assert_array_equal(ours, raw)

    stream = [
        (position, token) for position, document in enumerate(order) for token in range(sizes[document])
    ]
    for k in range(len(ours) - 1):
        (first, begin), (last, end) = ours[k], ours[k + 1] + [0, extra]
        read = [
            (position, token)
            for position in range(first, last + 1)
            for token in range(
                begin if position == first else 0, end if position == last else sizes[order[position]]
            )
        ]
        assert read == stream[k * seq_length : (k + 1) * seq_length + extra]
    assert len(ours) - 1 == (
        (len(stream) - extra) // seq_length if drop_last else -(-(len(stream) - extra) // seq_length)
    )


@every
@pytest.mark.parametrize(("sizes", "end"), [([5, 0, 0], [0, 4]), ([0, 3, 2], [2, 1]), ([4, 1, 0], [1, 0])])
def test_a_short_last_sample_ends_at_the_last_token_there_is(impl, sizes, end):
    """megatron-core ends at token -1 of a last document that is empty, which its own wrapper refuses."""
    order = np.arange(3, dtype=np.int32)
    assert index.sample_index(sizes, order, 3, 1, 5, False, impl=impl).tolist()[-1] == end
    if sizes[-1] == 0:
        with pytest.raises(AssertionError):
            helpers.build_sample_idx(np.array(sizes, np.int32), order, 3, 1, 5, False, True)


@every
def test_rows_are_int64_once_int32_cannot_count_the_documents(impl, monkeypatch):
    sizes, order = shuffled([3, 0, 7, 1, 12], 2, seed=5)
    monkeypatch.setattr(index, "_INT32_MAX", len(order))
    assert index.sample_index(sizes, order, 4, 2, 23, impl=impl).dtype == np.int32
    monkeypatch.setattr(index, "_INT32_MAX", len(order) - 1)
    wide = index.sample_index(sizes, order, 4, 2, 23, impl=impl)
    assert wide.dtype == np.int64
    np.testing.assert_array_equal(wide, helpers.build_sample_idx_int64(sizes, order, 4, 2, 23, True, 1))


@every
def test_document_ids_may_be_int64(impl):
    sizes, order = shuffled([3, 0, 7, 1, 12], 2, seed=5)
    narrow = index.sample_index(sizes, order, 4, 2, 23, impl=impl)
    np.testing.assert_array_equal(
        index.sample_index(sizes, order.astype(np.int64), 4, 2, 23, impl=impl), narrow
    )


@every
def test_counts_beyond_32_bits_are_exact(impl):
    size, epochs, seq_length = 2**31 - 1, 5, 2**28 - 3
    sizes, order = np.full(3, size, np.int32), np.tile(np.arange(3, dtype=np.int32), epochs)
    total = 3 * size * epochs
    for drop_last, rows in ((True, (total - 1) // seq_length), (False, -(-(total - 1) // seq_length))):
        found = index.sample_index(
            sizes, order, seq_length, epochs, 3 * size, drop_last, 1, impl=impl
        ).tolist()
        assert len(found) - 1 == rows
        short = [] if drop_last else [found.pop()]
        assert short in ([], [[len(order) - 1, size - 1]])
        assert [position * size + token for position, token in found] == [
            k * seq_length for k in range(len(found))
        ]
        if drop_last:
            assert (
                found
                == helpers.build_sample_idx_int64(
                    sizes, order, seq_length, epochs, 3 * size, True, 1
                ).tolist()
            )


@every
@pytest.mark.parametrize("tokens", [510, 511, 512, 513, 20_000])
def test_a_result_of_whole_pages_and_parts_of_them_is_complete_and_its_own(impl, tokens):
    sizes, order = np.full(tokens, 1, np.int32), np.arange(tokens, dtype=np.int32)
    found = index.sample_index(sizes, order, 1, 1, tokens, True, 0, impl=impl)
    expected = helpers.build_sample_idx_int32(sizes, order, 1, 1, tokens, True, 0)
    np.testing.assert_array_equal(found, expected)
    found += 1  # writable, and nobody else's
    np.testing.assert_array_equal(
        index.sample_index(sizes, order, 1, 1, tokens, True, 0, impl=impl), found - 1
    )


@native
def test_a_result_that_no_memory_holds_is_refused():
    with pytest.raises(MemoryError):
        index.IMPLEMENTATIONS["C++"].sample_index(SIZES, ORDER, 1, 2**61 - 1, 5, 1, False)


@every
def test_no_sample_is_lost_to_float32(impl):
    """megatron-core counts in float32 where the last sample may be short, and loses that sample here."""
    seq_length, samples = 2048, 976_562
    tokens = samples * seq_length + 2  # the samples, one token more, and that one's label
    sizes, order = np.array([tokens], np.int32), np.zeros(1, np.int32)
    assert len(index.sample_index(sizes, order, seq_length, 1, tokens, False, impl=impl)) - 1 == samples + 1
    assert len(helpers.build_sample_idx_int32(sizes, order, seq_length, 1, tokens, False, 1)) - 1 == samples


@every
def test_sizes_may_lie_at_an_odd_byte(impl):
    sizes, order = shuffled([3, 0, 7, 1, 12], 2, seed=5)
    odd = np.frombuffer(b"\0\0\0" + sizes.tobytes(), np.int32, len(sizes), 3)
    assert not odd.flags.aligned
    np.testing.assert_array_equal(
        index.sample_index(odd, order, 4, 2, 23, impl=impl), index.sample_index(sizes, order, 4, 2, 23)
    )


@every
@pytest.mark.parametrize(
    ("sizes", "order", "seq_length", "epochs", "per_epoch", "extra", "message"),
    [
        ([5], [0], 0, 1, 5, 1, "seq_length=0"),
        ([5], [0], 2, 0, 5, 1, "num_epochs=0"),
        ([5], [0], 2, 1, 0, 1, "tokens_per_epoch=0"),
        ([5], [0], 2, 1, 5, 2, "add_extra_token=2"),
        ([5], [0], 2, 1, 9, 1, "have 5 tokens in total, but num_tokens is 9"),
        ([5], [], 2, 1, 9, 1, "have 0 tokens in total, but num_tokens is 9"),
        ([5, -3], [0, 1], 2, 1, 9, 1, "-3"),
        ([5], [0], 2**62, 1, 2**62, 1, "2\\*\\*63"),
        ([2**31], [0], 2, 1, 9, 1, "sizes must fit int32"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(
    impl, sizes, order, seq_length, epochs, per_epoch, extra, message
):
    for drop_last in (True, False):
        with pytest.raises(ValueError, match=message):
            index.sample_index(
                sizes, np.array(order, np.int32), seq_length, epochs, per_epoch, drop_last, extra, impl=impl
            )


@every
@pytest.mark.parametrize("bad", [-1, 2, 2**31 - 1])
def test_a_document_that_is_not_there_is_refused(impl, bad):
    with pytest.raises(IndexError, match=str(bad)):
        index.sample_index([5, 6], np.array([0, bad], np.int32), 2, 1, 11, impl=impl)


# ---- shuffling ----


@every
@given(
    size=st.integers(0, 3000),
    seed=st.integers(0, 2**32 - 1),
    used=st.integers(0, 700),
    kind=st.sampled_from(["<i4", "<u4", "<i8"]),
)
@example(size=2, seed=0, used=624, kind="<i4")
@example(size=4096, seed=1, used=1, kind="<u4")
@example(size=4097, seed=1, used=623, kind="<u4")
def test_shuffle_is_numpys_and_leaves_numpys_state(impl, size, seed, used, kind):
    theirs, ours = np.random.RandomState(seed), np.random.RandomState(seed)
    for state in (theirs, ours):
        state.randint(0, 2**32, used, dtype=np.uint32)  # any place in the generator's block
        state.standard_normal(seed % 2)  # leaves a second normal number behind, which must survive
    expected, found = np.arange(size, dtype=kind), np.arange(size, dtype=kind)
    theirs.shuffle(expected)
    index.shuffle(found, ours, impl=impl)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(ours.standard_normal(5), theirs.standard_normal(5))
    assert ours.randint(0, 2**31) == theirs.randint(0, 2**31)


@pytest.mark.parametrize(
    "values",
    [np.arange(50.0), np.arange(50, dtype=np.int16), np.arange(100)[::2], np.arange(60).reshape(20, 3)],
    ids=["float", "int16", "strided", "2-D"],
)
@pytest.mark.parametrize("bits", [np.random.MT19937, np.random.PCG64])
def test_what_the_extension_does_not_shuffle_numpy_shuffles(values, bits):
    expected, found = values.copy(), values.copy()
    np.random.RandomState(bits(3)).shuffle(expected)
    index.shuffle(found, np.random.RandomState(bits(3)))
    np.testing.assert_array_equal(found, expected)


@every
@given(num_samples=st.integers(0, 500), rest=st.integers(0, 300), seed=st.integers(0, 1000))
def test_shuffle_index_is_megatron_cores(impl, num_samples, rest, seed):
    theirs, ours = np.random.RandomState(seed), np.random.RandomState(seed)
    expected = gpt_dataset._build_shuffle_index(num_samples, num_samples + rest, theirs)
    found = index.shuffle_index(num_samples, num_samples + rest, ours, impl=impl)
    assert found.dtype == expected.dtype == np.uint32
    np.testing.assert_array_equal(found, expected)
    assert ours.randint(2**31) == theirs.randint(2**31)


def test_shuffle_index_refuses_a_part_larger_than_the_whole():
    with pytest.raises(ValueError, match="num_samples must be from 0 to total = 3, got 4"):
        index.shuffle_index(4, 3, np.random.RandomState(0))


@every
@given(
    first=st.integers(0, 50),
    count=st.integers(1, 60),
    epochs=st.integers(1, 5),
    separate=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_document_index_is_megatron_cores(impl, first, count, epochs, separate, seed):
    documents = np.arange(first, first + count, dtype=np.int32)
    expected = gpt_dataset._build_document_index(documents, epochs, np.random.RandomState(seed), separate)
    found = index.document_index(documents, epochs, np.random.RandomState(seed), separate, impl=impl)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


# ---- blending ----


# ---- gathering ----

TOKENS = np.array([10, 11, 12, 20, 30, 31], np.uint16)
POINTERS, SIZES = np.array([0, 6, 6, 8], np.int64), np.array([3, 0, 1, 2], np.int32)
ORDER = np.array([3, 1, 0, 2], np.int32)  # 30 31 | - | 10 11 12 | 20


@every
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "i4", "i8"])
@pytest.mark.parametrize("order", [ORDER, ORDER.astype(np.int64)], ids=["int32", "int64"])
def test_gather_copies_documents_end_to_end(impl, kind, order):
    tokens, pointers = TOKENS.astype(kind), POINTERS // 2 * np.dtype(kind).itemsize
    for (first, begin, last, end), expected in {
        (0, 0, 3, 1): [30, 31, 10, 11, 12, 20],
        (0, 1, 2, 2): [31, 10, 11],
        (2, 1, 2, 3): [11, 12],
        (0, 2, 2, 1): [10],  # begins where a document ends
        (1, 0, 1, 0): [],
    }.items():
        out = np.full(len(expected), -7, np.int64)
        assert impl.gather(tokens, pointers, SIZES, order, first, begin, last, end, 32, out) == -1
        assert out.tolist() == expected


@every
@pytest.mark.parametrize(("limit", "bad"), [(31, 1), (30, 0), (32, -1), (0, 0)])
def test_gather_finds_the_first_id_outside_the_vocabulary(impl, limit, bad):
    assert impl.gather(TOKENS, POINTERS, SIZES, ORDER, 0, 0, 3, 1, limit, np.zeros(6, np.int64)) == bad


@every
@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "i8"])
def test_gather_finds_negative_ids(impl, kind):
    tokens, pointers = TOKENS.astype(kind), POINTERS // 2 * np.dtype(kind).itemsize
    tokens[1] = -1
    assert impl.gather(tokens, pointers, SIZES, ORDER, 0, 0, 3, 1, 2**40, np.zeros(6, np.int64)) == 3


@every
@pytest.mark.parametrize(
    ("span", "length"),
    [
        ((0, 0, 3, 2), 7),  # past the last document
        ((0, 0, 4, 0), 6),
        ((-1, 0, 3, 1), 6),
        ((2, 0, 0, 1), 3),
        ((0, 3, 3, 1), 3),  # begins past its document
        ((0, -1, 3, 1), 7),
        ((2, 2, 2, 1), 0),
        ((0, 0, 3, 1), 5),  # more than fits
        ((0, 0, 3, 1), 7),  # less than asked for
    ],
)
def test_gather_never_leaves_a_document(impl, span, length):
    with pytest.raises(IndexError):
        impl.gather(TOKENS, POINTERS, SIZES, ORDER, *span, 100, np.zeros(length, np.int64))


@every
def test_gather_refuses_documents_outside_the_file(impl):
    for order, pointers, sizes in (
        ([9], POINTERS, SIZES),
        ([-1], POINTERS, SIZES),
        ([0], POINTERS + 8, SIZES),  # the last token would be past the file
        ([0], POINTERS - 2, SIZES),
        ([0], POINTERS, SIZES + 2**30),
    ):
        with pytest.raises(IndexError):
            impl.gather(
                TOKENS,
                pointers,
                sizes.astype(np.int32),
                np.array(order, np.int32),
                0,
                0,
                0,
                3,
                100,
                np.zeros(3, np.int64),
            )


# ---- the extension itself ----


@native
def test_the_extension_copies_no_array_in_silence():
    native = index.IMPLEMENTATIONS["C++"]
    with pytest.raises(TypeError):
        native.sample_index(np.array([5], np.int64), ORDER, 2, 1, 5, 1, False)
    with pytest.raises(TypeError):
        native.shuffle(np.arange(9, dtype=np.int16), np.zeros(624, np.uint32), 0)
    frozen = np.arange(9)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="writ"):
        native.shuffle(frozen, np.zeros(624, np.uint32), 0)
    with pytest.raises(ValueError, match="key"):
        native.shuffle(np.arange(9), np.zeros(600, np.uint32), 0)
    with pytest.raises(ValueError, match="625"):
        native.shuffle(np.arange(9), np.zeros(624, np.uint32), 625)
    with pytest.raises(ValueError, match="dimension"):
        native.sample_index(np.zeros((2, 2), np.int32), ORDER, 2, 1, 5, 1, False)
    with pytest.raises(ValueError, match=r"2\*\*63"):
        native.sample_index(SIZES, ORDER, 2**62, 3, 5, 1, False)


@native
def test_other_threads_run_while_the_extension_works():
    """With such a long switch interval, another thread runs during the call only if the call releases the
    global interpreter lock.
    """
    done, steps = threading.Event(), [0]

    def count() -> None:
        while not done.is_set():
            steps[0] += 1
            time.sleep(0)  # hands the lock back

    values, key = np.arange(4_000_000), np.random.RandomState(0).get_state()[1]
    interval, thread = sys.getswitchinterval(), threading.Thread(target=count)
    thread.start()
    while not steps[0]:
        time.sleep(0.001)
    sys.setswitchinterval(100)
    try:
        before = steps[0]
        index.IMPLEMENTATIONS["C++"].shuffle(values, key, 624)
        during = steps[0] - before
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()
    assert during > 0
