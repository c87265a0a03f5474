"""Token files: megatron-core reads ours, we read megatron-core's, byte for byte; damaged files are refused by
file and byte.
"""

from __future__ import annotations

import errno
import importlib
import io
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_hyperrouter.data.store import token_files as store
from megatron_hyperrouter.data.store.pair_writer import DiskRefused, PairWriter
from megatron_hyperrouter.data.store.token_files import IndexedDataset, IndexedWriter, smallest_dtype
from megatron_hyperrouter.data.text.streams import replacing
from megatron_hyperrouter.errors import DataError

megatron = importlib.import_module("megatron.core.datasets.indexed_dataset")

in_tmp_path = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
dtypes = st.sampled_from([np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64])
# documents of sequence lengths
corpora = st.lists(st.lists(st.integers(0, 5), min_size=0, max_size=4), min_size=0, max_size=12)


def random_documents(shape: list[list[int]], dtype: type, seed: int = 0) -> list[np.ndarray]:
    random, limits = np.random.default_rng(seed), np.iinfo(dtype)
    return [
        random.integers(limits.min, limits.max, sum(lengths), dtype=dtype, endpoint=True) for lengths in shape
    ]


def write_ours(prefix: Path, shape: list[list[int]], dtype: type) -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for tokens, lengths in zip(random_documents(shape, dtype), shape, strict=True):
            writer.add_document(tokens, None if len(lengths) == 1 else lengths)


def write_megatrons(prefix: Path, shape: list[list[int]], dtype: type) -> None:
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for tokens, lengths in zip(random_documents(shape, dtype), shape, strict=True):
        builder.add_document(tokens, lengths)
    builder.finalize(f"{prefix}.idx")


def pair(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


# ---- the format ----


@in_tmp_path
@given(shape=corpora, dtype=dtypes)
def test_our_files_are_megatron_cores_byte_for_byte(tmp_path, shape, dtype):
    write_ours(tmp_path / "ours", shape, dtype)
    write_megatrons(tmp_path / "theirs", shape, dtype)
    assert pair(tmp_path / "ours") == pair(tmp_path / "theirs")


@in_tmp_path
@given(shape=corpora, dtype=dtypes)
def test_both_readers_read_the_same(tmp_path, shape, dtype):
    write_megatrons(tmp_path / "corpus", shape, dtype)
    ours = IndexedDataset(tmp_path / "corpus")
    flat = np.concatenate([np.zeros(0, dtype), *random_documents(shape, dtype)])
    assert (len(ours), ours.num_tokens, ours.dtype) == (sum(map(len, shape)), len(flat), dtype)
    np.testing.assert_array_equal(ours.tokens, flat)
    assert [ours.document_of(i) for i in range(len(ours))] == [
        d for d, lengths in enumerate(shape) for _ in lengths
    ]
    if not len(flat):
        return  # megatron-core cannot map an empty file
    theirs = megatron.IndexedDataset(str(tmp_path / "corpus"))
    np.testing.assert_array_equal(ours.sizes, theirs.sequence_lengths)
    np.testing.assert_array_equal(ours.pointers, theirs.index.sequence_pointers)
    np.testing.assert_array_equal(ours.document_indices, theirs.document_indices)
    for i in range(len(ours)):
        np.testing.assert_array_equal(ours.get(i), theirs.get(i))
        for offset in range(int(ours.sizes[i])):
            np.testing.assert_array_equal(ours.get(i, offset, 1), theirs.get(i, offset, 1))
            np.testing.assert_array_equal(ours.get(i, offset), theirs.get(i, offset))


def test_chunks_join_without_a_seam(tmp_path, monkeypatch):
    shape = [[3], [0], [2, 2], [1], [], [4, 1, 1], [2]] * 5
    write_megatrons(tmp_path / "theirs", shape, np.uint16)
    monkeypatch.setattr(store, "_CHUNK", 4)
    monkeypatch.setattr(store, "_CHECKED", 4)
    write_ours(tmp_path / "ours", shape, np.uint16)
    assert pair(tmp_path / "ours") == pair(tmp_path / "theirs")
    assert IndexedDataset(tmp_path / "ours").num_tokens == 5 * 16


def test_many_documents_at_once_are_the_same_as_one_by_one(tmp_path):
    write_ours(tmp_path / "single", [[3], [0], [7]], np.uint16)
    with IndexedWriter(tmp_path / "many", np.uint16) as writer:
        writer.add_documents(np.concatenate(random_documents([[3], [0], [7]], np.uint16)), [3, 0, 7])
        assert (writer.num_documents, writer.num_sequences, writer.num_tokens) == (3, 3, 10)
    assert pair(tmp_path / "many") == pair(tmp_path / "single")


def test_files_with_multimodal_modes_are_read_without_them(tmp_path):
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "modes.bin"), dtype=np.int32, multimodal=True)
    builder.add_item(torch.tensor([1, 2, 3]), mode=1)
    builder.end_document()
    builder.finalize(str(tmp_path / "modes.idx"))
    assert IndexedDataset(tmp_path / "modes").get(0).tolist() == [1, 2, 3]


@pytest.mark.parametrize("vocab_size", [None, 1, 65499, 65500, 65536, 70000, 200_000])
def test_smallest_dtype_is_megatron_cores(vocab_size):
    assert smallest_dtype(vocab_size) == megatron.DType.optimal_dtype(vocab_size)


# ---- reading ----


@pytest.fixture
def prefix(tmp_path) -> Path:
    """Documents of 5, 0 and 3 tokens, the last in sequences of 1 and 2; 16 bytes of tokens."""
    write_ours(tmp_path / "corpus", [[5], [0], [1, 2]], np.uint16)
    return tmp_path / "corpus"


def test_get_never_reads_past_its_sequence(prefix):
    data = IndexedDataset(prefix)
    assert data.get(0, 5).tolist() == data.get(1).tolist() == data.get(3, 0, 0).tolist() == []
    for i, offset, length in ((0, 0, 6), (0, 6, None), (0, -1, 2), (0, 1, -1), (1, 0, 1), (3, 1, 2)):
        with pytest.raises(ValueError, match=re.escape(f"{prefix}.bin")):
            data.get(i, offset, length)
    for i in (-1, 4):
        with pytest.raises(IndexError, match=re.escape(f"{prefix}.idx has no sequence {i}")):
            data.get(i)


def test_tokens_cannot_be_written_through_the_reader(prefix):
    with pytest.raises(ValueError, match="read-only"):
        IndexedDataset(prefix).get(0)[0] = 1


def test_a_pickled_dataset_opens_its_files_again(prefix):
    text = pickle.dumps(IndexedDataset(prefix))
    assert len(text) < 1000
    np.testing.assert_array_equal(pickle.loads(text).tokens, IndexedDataset(prefix).tokens)


# ---- damaged files; the header is magic 0-8, version 9-16, type 17, sequences 18-25, marks 26-33; then 4
# sizes at 34,
# ---- 4 pointers at 50 and 4 marks at 82, up to byte 114


def refuses(prefix: Path, ending: str, byte: int, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        IndexedDataset(prefix)
    assert str(prefix) + ending in caught.value.message
    assert f"byte {byte}:" in caught.value.message, caught.value.message
    for word in words:
        assert word in caught.value.message, caught.value.message
    assert caught.value.remedy


def overwrite(prefix: Path, ending: str, byte: int, content: bytes) -> None:
    path = Path(str(prefix) + ending)
    old = path.read_bytes()
    path.write_bytes(old[:byte] + content + old[byte + len(content) :])


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_missing_file_is_named(prefix, ending):
    Path(str(prefix) + ending).unlink()
    with pytest.raises(DataError, match=re.escape(f"{prefix}{ending}: no such file")) as caught:
        IndexedDataset(prefix)
    assert "an existing .bin and .idx file" in caught.value.remedy


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "corpus.idx").mkdir()
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/corpus.idx cannot be read")):
        IndexedDataset(tmp_path / "corpus")


@pytest.mark.parametrize("kept", [0, 4, 15])
def test_a_truncated_bin_is_refused(prefix, kept):
    Path(f"{prefix}.bin").write_bytes(Path(f"{prefix}.bin").read_bytes()[:kept])
    refuses(prefix, ".bin", kept, f"the end of the file after {kept} bytes")


def test_a_bin_of_another_run_is_refused(prefix):
    Path(f"{prefix}.bin").write_bytes(bytes(18))
    refuses(prefix, ".bin", 16, "18 bytes", ".idx does not belong to this file")


@pytest.mark.parametrize("kept", [0, 8, 33, 34, 60, 100, 113])
def test_a_truncated_idx_is_refused(prefix, kept):
    Path(f"{prefix}.idx").write_bytes(Path(f"{prefix}.idx").read_bytes()[:kept])
    refuses(prefix, ".idx", kept, f"{kept} bytes")


def test_an_idx_that_goes_on_is_refused(prefix):
    overwrite(prefix, ".idx", 114, b"more")
    overwrite(prefix, ".idx", 118, b"and more")
    refuses(prefix, ".idx", 114, "114 bytes for 4 sequences and 4 document marks")


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04" + bytes(200), b"#!/bin/sh\n" * 20, b"MMIDIDX\x00\x01" + bytes(200)]
)
def test_a_foreign_idx_is_refused(prefix, content):
    Path(f"{prefix}.idx").write_bytes(content)
    refuses(prefix, ".idx", 0, "MMIDIDX")


@pytest.mark.parametrize(
    ("byte", "content", "words"),
    [
        (9, struct.pack("<Q", 2), ["version 1", "version 2"]),
        (17, b"\x00", ["code 0"]),
        (17, b"\x06", ["integer type", "code 6"]),  # float64
        (17, b"\x09", ["code 9"]),
        (34, struct.pack("<i", -1), ["sequence 0", "-1"]),
        (50, struct.pack("<q", -2), ["sequence 0", "-2"]),
        (58, struct.pack("<q", 11), ["sequence 1", "multiple of 2", "11"]),
        (82, struct.pack("<q", 1), ["mark 0 to be 0", "1"]),
        (98, struct.pack("<q", 0), ["mark 2 to be at least 1", "0"]),
        (106, struct.pack("<q", 3), ["mark 3 to be 4", "3"]),
        (106, struct.pack("<q", 5), ["mark 3 to be 4", "5"]),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 3, 1 << 20])
def test_an_inconsistent_idx_is_refused(prefix, byte, content, words, chunk, monkeypatch):
    monkeypatch.setattr(store, "_CHECKED", chunk)
    overwrite(prefix, ".idx", byte, content)
    refuses(prefix, ".idx", byte, *words)


@pytest.mark.parametrize(
    ("sequences", "marks"), [(3, 4), (4, 3), (5, 4), (2**60, 4), (4, 2**60), (2**64 - 1, 2**64 - 1)]
)
def test_counts_that_do_not_fit_the_idx_are_refused(prefix, sequences, marks):
    overwrite(prefix, ".idx", 18, struct.pack("<QQ", sequences, marks))
    refuses(
        prefix,
        ".idx",
        min(114, 34 + 12 * sequences + 8 * marks),
        f"{sequences} sequences and {marks} document marks",
        "114 bytes",
    )


def test_an_idx_without_marks_is_refused(tmp_path):
    Path(tmp_path / "corpus.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 0, 0))
    Path(tmp_path / "corpus.bin").write_bytes(b"")
    refuses(tmp_path / "corpus", ".idx", 26, "at least one document mark")


@pytest.mark.parametrize(
    ("byte", "content", "sequence"),
    [
        (34, struct.pack("<i", 9), 0),
        (34, struct.pack("<i", 2**31 - 1), 0),
        (58, struct.pack("<q", 100), 1),  # an empty one
        (74, struct.pack("<q", 14), 3),
        (74, struct.pack("<q", 2**63 - 2), 3),
    ],
)
@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_a_sequence_beyond_the_bin_is_refused(prefix, byte, content, sequence, chunk, monkeypatch):
    monkeypatch.setattr(store, "_CHECKED", chunk)
    overwrite(prefix, ".idx", byte, content)
    refuses(prefix, ".bin", 16, f"sequence {sequence} to reach byte")


@in_tmp_path
@given(st.data())
def test_no_damage_reads_outside_the_file_or_ends_in_another_error(tmp_path, data):
    prefix = tmp_path / "corpus"
    write_ours(prefix, [[5], [0], [1, 2], [4]], np.uint16)
    for ending in data.draw(
        st.lists(st.sampled_from([".idx", ".idx", ".idx", ".bin"]), min_size=1, max_size=3)
    ):
        path = Path(str(prefix) + ending)
        content = bytearray(path.read_bytes())
        if content and data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(content) - 1))
            piece = data.draw(st.binary(min_size=1, max_size=9))
            content[at : at + len(piece)] = piece
        else:
            del content[data.draw(st.integers(0, len(content))) :]
        path.write_bytes(content)
    try:
        found = IndexedDataset(prefix)
    except DataError as error:
        assert str(prefix) in error.message and error.remedy
    else:
        size = Path(f"{prefix}.bin").stat().st_size
        for i in range(len(found)):
            assert found.pointers[i] >= 0 and found.pointers[i] + found.get(i).nbytes <= size


# ---- writing ----


def test_nothing_has_its_name_before_it_is_whole(tmp_path):
    writer = IndexedWriter(tmp_path / "corpus", np.uint16)
    writer.add_document([1, 2, 3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.bin.partial", "corpus.idx.partial"]
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.bin", "corpus.idx"]


def test_links_under_temporary_names_are_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    writers = {
        "corpus": lambda prefix: IndexedWriter(prefix, np.uint16).abort(),
        "grown": lambda prefix: PairWriter(str(prefix), np.uint16).close(),
    }
    for name, write in writers.items():
        for ending in ("bin", "idx", "sizes", "counts"):
            (tmp_path / f"{name}.{ending}.partial").symlink_to(victim)
        write(tmp_path / name)
    (tmp_path / "out.json.partial").symlink_to(victim)
    with replacing(str(tmp_path / "out.json")) as stream:
        stream.write(b"{}")
    assert victim.read_bytes() == b"precious" and (tmp_path / "out.json").read_bytes() == b"{}"
    writer = PairWriter(str(tmp_path / "again"), np.uint16)
    counts = writer.save()
    writer.close()
    for ending in ("bin", "sizes", "counts"):  # in place of what an earlier run has begun
        (tmp_path / f"again.{ending}.partial").unlink()
        (tmp_path / f"again.{ending}.partial").symlink_to(victim)
    with pytest.raises(DiskRefused, match=r"again\.bin\.partial cannot be written"):
        PairWriter(str(tmp_path / "again"), np.uint16, counts)
    assert victim.read_bytes() == b"precious"


def test_an_exception_leaves_the_old_files_and_nothing_else(prefix):
    before = pair(prefix)
    with pytest.raises(KeyError), IndexedWriter(prefix, np.int32) as writer:
        writer.add_document([1, 2, 3])
        raise KeyError
    assert pair(prefix) == before
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["corpus.bin", "corpus.idx"]


@pytest.mark.parametrize("tokens", [[1, 70_000], np.array([1, 65_536]), [1, -1], [2**70]])
def test_a_token_that_does_not_fit_is_refused(tmp_path, tokens):
    refused = pytest.raises(DataError, match=r"corpus.bin, document 1: token id .* does not fit uint16")
    with refused as caught, IndexedWriter(tmp_path / "corpus", np.uint16) as writer:
        writer.add_document([65_535])
        writer.add_document(tokens)
    assert "vocabulary" in caught.value.remedy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lengths", [[1, 1], [4], [5, -2], [[3]]])
def test_lengths_that_do_not_add_up_are_refused(tmp_path, lengths):
    writer = IndexedWriter(tmp_path / "corpus", np.uint16)
    with pytest.raises(ValueError, match="add up to 3, the number of tokens"):
        writer.add_document([1, 2, 3], lengths)
    with pytest.raises(ValueError, match="add up to 3, the number of tokens"):
        writer.add_documents([1, 2, 3], lengths)
    writer.abort()


def test_a_document_longer_than_the_format_allows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_INT32_MAX", 4)
    for lengths in (None, [5]):
        with (
            pytest.raises(
                DataError, match="document 0: the document has 5 tokens, but the format allows at most 4"
            ),
            IndexedWriter(tmp_path / "a", "u2") as writer,
        ):
            writer.add_document([1, 2, 3, 4, 5], lengths)


@pytest.mark.parametrize("dtype", [np.uint32, np.float32, np.uint64])
def test_types_outside_the_format_are_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match=np.dtype(dtype).name):
        IndexedWriter(tmp_path / "corpus", dtype)


class FullDisk(io.BytesIO):
    """Takes nothing more."""

    def write(self, _: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("when", ["add", "close"])
def test_a_full_disk_ends_in_one_message_and_the_old_files(prefix, when):
    before = pair(prefix)
    with (
        pytest.raises(DataError, match=r"corpus.*No space left on device") as caught,
        IndexedWriter(prefix, np.uint16) as writer,
    ):
        if when == "add":
            writer._bin.close()
            writer._bin = FullDisk()
        writer.add_document([1, 2, 3])
        writer._idx.close()
        writer._idx = FullDisk()
    assert "space" in caught.value.remedy
    assert pair(prefix) == before
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["corpus.bin", "corpus.idx"]


def test_an_old_index_never_stands_beside_new_tokens(prefix, monkeypatch):
    """Had the old index stayed, a stop between the two renamings could leave a pair that looks whole."""
    replace = Path.replace

    def stop(self, target):
        if str(target).endswith(".idx"):
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(DataError, match="Input/output error"), IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document(range(8))
    with pytest.raises(DataError, match=r"corpus\.idx: no such file"):
        IndexedDataset(prefix)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="file"):
        IndexedWriter(tmp_path / "file" / "corpus", np.uint16)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_checking_an_index_does_not_keep_it_in_memory(tmp_path):
    """The index of 2 million sequences has 40 MB, of which their sizes, 8 MB, stay mapped: a sample index
    reads them next.
    """
    sizes = np.full(2_000_000, 3, np.int32)
    with open(tmp_path / "c.idx", "wb") as stream:
        stream.write(store.index_header("<u2", len(sizes), len(sizes)))
        for part in (
            sizes,
            np.arange(len(sizes), dtype=np.int64) * 6,
            np.arange(len(sizes) + 1, dtype=np.int64),
        ):
            part.tofile(stream)
    with open(tmp_path / "c.bin", "wb") as stream:
        stream.truncate(6 * len(sizes))
    program = """
import sys
from megatron_hyperrouter.data.store.token_files import IndexedDataset
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
store = IndexedDataset(sys.argv[1], whole=False)
before = peak()
store.check()
print(peak() - before)
"""
    told = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "c")], capture_output=True, text=True, check=True
    )
    assert float(told.stdout) < 16


@pytest.mark.parametrize(
    ("given", "meant"),
    [("corpus", "corpus_text_document"), ("corpus_text_document.bin", "corpus_text_document")],
)
def test_a_prefix_without_its_ending_is_suggested(tmp_path: Path, given: str, meant: str) -> None:
    with IndexedWriter(tmp_path / "corpus_text_document", np.uint16) as writer:
        writer.add_document([1, 2])
    with pytest.raises(DataError, match="no such file") as caught:
        IndexedDataset(tmp_path / given)
    assert caught.value.remedy == f"did you mean {tmp_path / meant}?"
    with pytest.raises(DataError) as caught:
        IndexedDataset(tmp_path / "other")
    assert caught.value.remedy.startswith("give the prefix of an existing .bin and .idx file")
