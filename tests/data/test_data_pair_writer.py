"""The writer of growing files against megatron-core's builder, continuing after a kill at any point, and one
message for a full disk.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hyperrouter.data.store import pair_writer
from megatron_hyperrouter.data.store.pair_writer import (
    Counts,
    DiskRefused,
    PairWriter,
    holds,
    put_in_place,
    remove_partial,
)

Document = list[list[int]]  # the ids of each sequence
DOCUMENTS = st.lists(
    st.lists(st.lists(st.integers(0, 65499), min_size=1, max_size=4), max_size=3), min_size=1, max_size=6
)
# each: the documents of a call, and whether the last goes on with the next call
CALLS = st.lists(st.tuples(DOCUMENTS, st.booleans()), min_size=1, max_size=5)


def by_megatron(prefix: str, documents: list[Document], dtype: type) -> tuple[bytes, bytes]:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(
            [token for sequence in sequences for token in sequence], [len(sequence) for sequence in sequences]
        )
    builder.finalize(prefix + ".idx")
    return both(prefix)


def both(prefix: str) -> tuple[bytes, bytes]:
    return Path(prefix + ".bin").read_bytes(), Path(prefix + ".idx").read_bytes()


def joined(calls: list[tuple[list[Document], bool]]) -> list[Document]:
    """The documents that the calls mean; the last call closes."""
    found: list[Document] = []
    goes_on = False
    for number, (documents, last_goes_on) in enumerate(calls):
        if goes_on:
            found[-1] = found[-1] + documents[0]
        found += documents[1:] if goes_on else documents
        goes_on = last_goes_on and number < len(calls) - 1
    return found


def write(writer: PairWriter, documents: list[Document], closes: bool, dtype: type) -> None:
    tokens = np.array(
        [token for sequences in documents for sequence in sequences for token in sequence], dtype
    )
    lengths = np.array([len(sequence) for sequences in documents for sequence in sequences], np.int32)
    writer.write(
        tokens, lengths, np.array([len(sequences) for sequences in documents], np.int32), closes=closes
    )


@given(
    calls=CALLS,
    dtype=st.sampled_from([np.uint16, np.int32]),
    chunk=st.integers(1, 9),
    deaths=st.sets(st.integers(0, 4)),
)
def test_bytes_are_those_of_megatron_however_often_it_dies(
    tmp_path_factory: pytest.TempPathFactory,
    calls: list[tuple[list[Document], bool]],
    dtype: type,
    chunk: int,
    deaths: set[int],
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    prefix = str(folder / "p")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_writer, "_CHUNK", chunk)
        patch.setattr(pair_writer, "_BUFFER", 16)
        writer = PairWriter(prefix, dtype)
        for number, (documents, goes_on) in enumerate(calls):
            if number in deaths:  # what was written since the save is lost, in whole or in part
                saved = writer.save()
                write(writer, [[[1, 2, 3]], [[4], [5]]], True, dtype)
                writer.close()
                assert holds(prefix, dtype, saved)
                writer = PairWriter(prefix, dtype, Counts(**saved.as_dict()))
            write(writer, documents, not goes_on or number == len(calls) - 1, dtype)
        counts = writer.save()
        writer.close()
        idx = put_in_place(prefix, dtype, counts)
    expected = joined(calls)
    assert both(prefix) == by_megatron(str(folder / "oracle"), expected, dtype)
    assert counts == Counts(len(expected), sum(map(len, expected)), sum(len(s) for d in expected for s in d))
    for total, content in zip((writer.bin_sum(), idx), both(prefix), strict=True):
        assert (total.bytes, total.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    remove_partial(prefix)
    assert sorted(path.name for path in folder.iterdir()) == ["oracle.bin", "oracle.idx", "p.bin", "p.idx"]


def test_files_get_their_names_again_after_a_death_between_them(tmp_path: Path) -> None:
    prefix = str(tmp_path / "p")
    for ending in ("bin", "idx"):
        Path(f"{prefix}.{ending}").write_bytes(b"of an older run")
    writer = PairWriter(prefix, np.uint16)
    write(writer, [[[1, 2]], [[3]]], True, np.uint16)
    counts = writer.save()
    writer.close()
    put_in_place(prefix, np.uint16, counts)
    whole = both(prefix)
    Path(f"{prefix}.idx").unlink()  # as if it had died before the second name
    assert holds(prefix, np.uint16, counts, complete=True)
    assert not holds(prefix, np.uint16, counts)
    put_in_place(prefix, np.uint16, counts)
    assert both(prefix) == whole
    Path(f"{prefix}.bin").write_bytes(b"other")
    assert not holds(prefix, np.uint16, counts, complete=True)


def test_less_than_was_saved_is_not_gone_on_with(tmp_path: Path) -> None:
    prefix = str(tmp_path / "p")
    writer = PairWriter(prefix, np.uint16)
    write(writer, [[[1, 2]], [[3], [4]]], True, np.uint16)
    counts = writer.save()
    writer.close()
    for ending in ("bin", "sizes", "counts"):
        path = Path(f"{prefix}.{ending}.partial")
        content = path.read_bytes()
        path.write_bytes(content[:-1])  # a machine that lost power and its cache
        assert not holds(prefix, np.uint16, counts)
        path.write_bytes(content)
        assert holds(prefix, np.uint16, counts)


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DiskRefused, match=r"file.* cannot be written: ") as caught:
        PairWriter(str(tmp_path / "file" / "p"), np.uint16)
    assert "--output-prefix" in caught.value.remedy
    writer = PairWriter(str(tmp_path / "p"), np.uint16)
    writer._streams["bin"] = open("/dev/full", "wb")  # noqa: SIM115 - the writer closes it
    write(writer, [[[1, 2]]], True, np.uint16)
    with pytest.raises(DiskRefused, match="No space left on device"):
        writer.save()
    writer.close()
