"""Parquet files are read back as they were written: each row once, in batches of limited size, whole or in
parts.  Error messages name the file and the row.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from megatron_hyperrouter.data.text import corpus
from megatron_hyperrouter.data.text import parquet as parquet_files
from megatron_hyperrouter.data.text.corpus import documents, read_batches
from megatron_hyperrouter.data.text.inputs import InputRange, total_bytes
from megatron_hyperrouter.errors import DataError, HostError

arrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402 - after the check that it is there

TEXTS = [f"row {number} żółw " + "x" * (number * 37 % 90) for number in range(50)]


def table(path: Path, values: object, kind: object = None, rows: int = 7, name: str = "text") -> str:
    column = arrow.array(values, type=kind)
    columns = [column, arrow.array(range(len(column)))]
    parquet.write_table(arrow.table(columns, names=[name, "n"]), path, row_group_size=rows)
    return str(path)


def found(path: str, keys: tuple[str, ...] = ("text",), **options: object) -> list[tuple[list[str], ...]]:
    return [
        document for batch in read_batches([path], keys, **options) for document in documents(batch, keys)
    ]


@pytest.mark.parametrize("batch_bytes", [1, 300, 1 << 18])
@pytest.mark.parametrize("rows", [1, 7, 50])
def test_rows_arrive_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, batch_bytes: int
) -> None:
    monkeypatch.setattr(corpus, "BATCH_BYTES", batch_bytes)
    path = table(tmp_path / "a.parquet", TEXTS, rows=rows)
    assert found(path) == [([text],) for text in TEXTS]
    batches = list(read_batches([path]))
    assert [batch.first_line for batch in batches] == [1, *(batch.end.offset + 1 for batch in batches[:-1])]
    assert batches[-1].position == total_bytes([path])
    assert len(batches) >= 50 // rows
    for batch in batches:  # reading goes on from each place with the rows that follow
        rest = found(path, start=batch.end)
        assert rest == [([text],) for text in TEXTS[batch.end.offset :]]


@pytest.mark.parametrize("of", [1, 2, 3, 9, 60])
def test_parts_hold_whole_row_groups(tmp_path: Path, of: int) -> None:
    path = table(tmp_path / "a.parquet", TEXTS)
    parts = [found(path, part=InputRange(number, of)) for number in range(1, of + 1)]
    assert [row for part in parts for row in part] == [([text],) for text in TEXTS]
    assert all(len(part) % 7 in (0, 1) for part in parts)  # 7 groups of 7 rows, and one of 1


@pytest.mark.parametrize("name", ["text", "raw.text"])
def test_a_row_group_of_any_size_is_read_a_few_pages_at_a_time(tmp_path: Path, name: str) -> None:
    """Many writers put the whole file into one row group; its column as it lies on disk must not come into
    memory at once.
    """
    letters = random.Random(0)
    texts = ["".join(letters.choices("abcdefghijklmnop", k=2000)) for _ in range(2000)] * 6  # 24 MB
    path = tmp_path / "a.parquet"
    parquet.write_table(
        arrow.table({name: texts}),
        path,
        row_group_size=len(texts),
        compression="none",
        use_dictionary=False,
    )
    assert parquet.ParquetFile(path).num_row_groups == 1
    before, most, rows = arrow.total_allocated_bytes(), 0, 0
    for batch in read_batches([str(path)], (name,)):
        most = max(most, arrow.total_allocated_bytes() - before)
        rows += sum(1 for _ in documents(batch, (name,)))
    assert rows == len(texts)
    assert most < path.stat().st_size / 4


def test_kinds_of_columns(tmp_path: Path) -> None:
    assert found(table(tmp_path / "a.parquet", [b"bytes", "żółw".encode()], arrow.binary())) == [
        (["bytes"],),
        (["żółw"],),
    ]
    assert found(table(tmp_path / "b.parquet", ["large"], arrow.large_string())) == [(["large"],)]
    assert found(table(tmp_path / "c.parquet", [["one", "two"], [], ["three"]])) == [
        (["one", "two"],),
        ([],),
        (["three"],),
    ]
    encoded = arrow.array(["same"] * 9).dictionary_encode()
    parquet.write_table(arrow.table({"title": encoded, "text": TEXTS[:9]}), tmp_path / "d.parquet")
    assert found(str(tmp_path / "d.parquet"), ("text", "title")) == [([text], ["same"]) for text in TEXTS[:9]]


def test_bad_rows_and_columns(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"a\.parquet: there is no column 'text' \(columns present: 'body', 'n'\)"
    ):
        found(table(tmp_path / "a.parquet", TEXTS, name="body"))
    with pytest.raises(DataError, match=r"b\.parquet, row 9: the value of 'text' must be a string, not null"):
        found(table(tmp_path / "b.parquet", [*TEXTS[:8], None]))
    with pytest.raises(DataError, match=r"c\.parquet, row 1: the value of 'n' must be .* not a number"):
        found(table(tmp_path / "c.parquet", TEXTS), ("n",))
    with pytest.raises(DataError, match=r"d\.parquet, row 2, byte 3: the text is not UTF-8"):
        found(table(tmp_path / "d.parquet", [b"fine", b"caf\xe9"], arrow.binary()))
    latin = arrow.array([b"fine", b"caf\xe9"], arrow.binary()).view(arrow.string())
    with pytest.raises(DataError, match=r"e\.parquet, rows 1 to \d+: the text is not UTF-8"):
        found(table(tmp_path / "e.parquet", latin))
    with pytest.raises(DataError, match=r"f\.parquet: the file has 2 columns with the name 'n'"):
        found(table(tmp_path / "f.parquet", TEXTS, name="n"), ("n",))


def test_truncated_damaged_and_foreign(tmp_path: Path) -> None:
    whole = Path(table(tmp_path / "a.parquet", TEXTS * 20, rows=100)).read_bytes()
    for name, data in {
        "cut": whole[:-9],
        "half": whole[: len(whole) // 2],
        "foreign": b'{"text": "x"}\n' * 9,
    }.items():
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"footer of .*{name}\.parquet cannot be read") as caught:
            found(str(path))
        assert "it is truncated, damaged or not Parquet" in caught.value.remedy
    damaged = bytearray(whole)
    damaged[4:60] = b"\xff" * 56  # the first page's header
    (tmp_path / "damaged.parquet").write_bytes(damaged)
    with pytest.raises(DataError, match=r"row group 0 of .*damaged\.parquet cannot be read"):
        found(str(tmp_path / "damaged.parquet"))


def test_missing_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "a.parquet", TEXTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        HostError, match=r"a\.parquet: reading Parquet files needs the pyarrow library"
    ) as caught:
        found(path)
    assert caught.value.remedy == "run: pip install pyarrow"


def bomb(path: Path, rows: int, size: int, kind: object = None) -> str:
    """One long text that many rows share: a file of a few hundred bytes."""
    values = ["x" * size] * rows
    shared = arrow.array(values[:1]).dictionary_encode()
    column = arrow.DictionaryArray.from_arrays(arrow.array([0] * rows, arrow.int32()), shared.dictionary)
    if kind is not None:
        column = arrow.ListArray.from_arrays(list(range(rows + 1)), column)
    parquet.write_table(arrow.table({"text": column}), path, compression="zstd")
    return str(path)


@pytest.mark.parametrize("kind", [None, list])
@pytest.mark.parametrize("least", [0, 1 << 40])
def test_a_text_that_all_rows_share_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: object, least: int
) -> None:
    """Read in small batches, and (``least``) with equal texts kept once."""
    monkeypatch.setattr(parquet_files, "_LEAST_BATCH_BYTES", least)
    monkeypatch.setattr(parquet_files, "_MOST_BATCH_BYTES", 1 << 24)
    path = bomb(tmp_path / "a.parquet", rows=3000, size=1 << 20, kind=kind)
    assert Path(path).stat().st_size < 5000
    before, most, rows = arrow.total_allocated_bytes(), 0, 0
    for batch in read_batches([path]):
        most = max(most, arrow.total_allocated_bytes() - before)
        rows += len(batch.columns[0])
        assert sum(len(text) for text in batch.columns[0] if isinstance(text, str)) <= 2 << 20
        if rows > 300:
            break
    assert most < 1 << 26


def test_a_text_beyond_all_bounds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_files, "MOST_VALUE_BYTES", 1000)
    path = table(tmp_path / "a.parquet", ["short", "x" * 1001])
    with pytest.raises(DataError, match=r"a\.parquet, row 2: the text has 1001 bytes"):
        found(path)


@pytest.mark.parametrize("least", [0, 1 << 40])
def test_both_ways_of_reading_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    monkeypatch.setattr(parquet_files, "_LEAST_BATCH_BYTES", least)
    monkeypatch.setattr(parquet_files, "_MOST_BATCH_BYTES", 1)
    lists = [[text, "more"] if number % 3 else [] for number, text in enumerate(TEXTS)]
    assert found(table(tmp_path / "a.parquet", TEXTS)) == [([text],) for text in TEXTS]
    assert found(table(tmp_path / "b.parquet", lists)) == [(texts,) for texts in lists]
    binary = table(tmp_path / "c.parquet", [text.encode() for text in TEXTS], arrow.binary())
    assert found(binary) == [([text],) for text in TEXTS]
