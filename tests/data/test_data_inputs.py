"""Names, globs, what a file is, and the parts that machines read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megatron_hyperrouter.data.text.inputs import WHOLE, InputRange, expand, kind_of, parse_part, total_bytes
from megatron_hyperrouter.errors import ConfigError, DataError


def test_globs_are_sorted_and_names_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.jsonl", "b/10.jsonl", "b/c/1.jsonl", "a.jsonl", "odd[1].jsonl", "b/d.jsonl/x"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("{}")
    # the folder b/d.jsonl is no file
    assert expand(["b/*.jsonl", "a.jsonl"]) == [
        "b/10.jsonl",
        "b/2.jsonl",
        "a.jsonl",
    ]
    assert expand(["b/**/*.jsonl"]) == ["b/10.jsonl", "b/2.jsonl", "b/c/1.jsonl"]
    assert expand(["odd[1].jsonl"]) == ["odd[1].jsonl"]
    assert expand(["a.jsonl", "a.jsonl", "gone.jsonl"]) == ["a.jsonl", "a.jsonl", "gone.jsonl"]
    with pytest.raises(DataError, match=r"no input file matches: \*\.txt, x\?") as caught:
        expand(["*.txt", "a.jsonl", "x?"])
    assert "quote" in caught.value.remedy


def test_a_folder_says_how_to_name_its_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no readable input file") as caught:
        total_bytes([str(tmp_path)])
    assert f"'{tmp_path}/**/*.jsonl'" in caught.value.remedy


@given(total=st.integers(0, 1 << 50), of=st.integers(1, 300))
def test_parts_are_the_whole_end_to_end(total: int, of: int) -> None:
    stretches = [InputRange(number, of).stretch(total) for number in range(1, of + 1)]
    assert stretches[0][0] == 0 and stretches[-1][1] == total
    assert all(before[1] == after[0] for before, after in pairwise(stretches))
    sizes = [end - begin for begin, end in stretches]
    assert max(sizes) - min(sizes) <= 1


def test_shard_flags() -> None:
    assert parse_part(None, None) == parse_part(None, 1) == parse_part("1/1", None) == WHOLE
    assert parse_part("2/4", None) == parse_part("2", 4) == parse_part("2/4", 4) == InputRange(2, 4)
    for text, partitions in (
        ("0/4", None),
        ("5/4", None),
        ("2", None),
        ("2/4", 5),
        ("a/b", None),
        ("1/0", None),
        ("-1/4", None),
    ):
        with pytest.raises(ConfigError, match=r"--shard = .*must be I/N with 1 <= I <= N"):
            parse_part(text, partitions)
    with pytest.raises(ConfigError, match=r"--partitions = 4: needs --shard I"):
        parse_part(None, 4)


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.jsonl", "{}")
    return stream.getvalue()


FOREIGN = {
    "a.jsonl": [
        (gzip.compress(b"{}"), "compressed with gzip", "give the file a name that ends in .gz"),
        (zstandard.compress(b"{}"), "compressed with zstd", "give the file a name that ends in .zst"),
        (bz2.compress(b"{}"), "is compressed with bzip2, which is not supported", "decompress"),
        (lzma.compress(b"{}"), "is compressed with xz, which is not supported", "decompress"),
        (zipped(), "a zip archive", "unpack"),
        (b"MMIDIDX\x00\x00" + bytes(40), "is the index of existing token files", "text"),
    ],
    "a.txt": [(b"some text \x00\x01", "byte 10: the file has a NUL byte, so it is not text", "plain text")],
    "a.bin": [(b"\x01\x00\x02\x00", "byte 1: the file has a NUL", "plain text")],
    "a.tar.gz": [(gzip.compress(b"name" + bytes(500)), "a NUL", "plain text")],
}


@pytest.mark.parametrize(
    ("name", "case"), [(name, n) for name, cases in FOREIGN.items() for n in range(len(cases))]
)
def test_a_foreign_file_is_told_by_what_it_is(tmp_path: Path, name: str, case: int) -> None:
    data, message, remedy = FOREIGN[name][case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        kind_of(str(tmp_path / name))
    assert name in caught.value.message
    assert remedy in caught.value.remedy


def test_parquet_by_name_or_by_its_first_bytes(tmp_path: Path) -> None:
    for name, data in (("a.parquet", b"anything"), ("a.PQ", b""), ("a", b"PAR1...")):
        (tmp_path / name).write_bytes(data)
        assert kind_of(str(tmp_path / name)) == "parquet"


def test_a_hollow_file_is_truncated_and_an_empty_text_is_not(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.zst", "d.parquet", "e.txt")]
    for path in paths:
        path.touch()
    with pytest.raises(
        DataError, match=r"empty file: [^,]*b\.jsonl\.gz, [^,]*c\.zst, [^,]*d\.parquet\n"
    ) as caught:
        total_bytes([str(path) for path in paths])
    assert "download or write the file again" in caught.value.remedy
    assert total_bytes([str(paths[0]), str(paths[4])]) == 0
