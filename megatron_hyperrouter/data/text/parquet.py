"""Parquet files as a bounded stream of rows, with the optional library ``pyarrow``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from megatron_hyperrouter.errors import DataError, HostError

MOST_VALUE_BYTES = 1 << 29  # a longer text is not a document, and would fill the memory
_MOST_ROWS = 4096  # in one batch of the library
_MOST_BATCH_BYTES = 1 << 28
_LEAST_BATCH_BYTES = 512  # smaller ones cost more time than what is done with their text
# Bytes of the file that the library reads ahead for a column.  Without this it reads the whole column of a
# row
# group at once.
_BUFFER = 1 << 20


@dataclass(frozen=True)
class Rows:
    """Consecutive rows: for each key the values, and where in the file they are."""

    first: int  # number of the first row, from 0
    columns: tuple[list[object], ...]
    done: float  # of the file, 0 to 1, when these rows are read

    def __len__(self) -> int:
        return len(self.columns[0])


def read_rows(
    path: str, keys: Sequence[str], batch_bytes: int, owned: Callable[[float], bool], first: int = 0
) -> Iterator[Rows]:
    """The rows of the row groups that are ``owned``, in order, from row ``first`` on, about ``batch_bytes``
    of text at a time.

    ``owned(fraction)``: where in the file a row group begins, 0 to 1.  One row group at a time is open, and a
    few pages of it.  DataError for a file that is truncated, damaged, foreign or lacks a column, or a text of
    more than ``MOST_VALUE_BYTES``; HostError if the library is missing.
    """
    file = _File(path, keys)
    try:
        groups, before = file.metadata.num_row_groups, 0
        for number in range(groups):
            rows = file.metadata.row_group(number).num_rows
            if owned(number / groups) and before + rows > first:
                batches = file.batches(number, batch_bytes)
                yield from _group_rows(batches, file, number, batch_bytes, before, first)
            before += rows
    finally:
        file.close()


class _File:
    """An open file, read in one of two ways.

    A text that many rows share is in the file once, but the library copies it for each row of a batch.  So
    a batch has few rows: even if every row had the text of a whole row group, the batch would stay below
    ``_MOST_BATCH_BYTES``. If this makes batches too small to be fast, because rows are short and the row
    group is large, the library keeps equal texts once, as long as the row group is open.
    """

    def __init__(self, path: str, keys: Sequence[str]) -> None:
        self.path, self.keys = path, list(keys)
        self._plain = _open(path)
        self._sharing: Any = None
        self.metadata = self._plain.metadata
        try:
            _check_columns(path, keys, self._plain.schema_arrow.names)
            self._texts = [
                number
                for number in range(len(self._plain.schema))
                if self._plain.schema.column(number).physical_type == "BYTE_ARRAY"
                and f"{self._plain.schema.column(number).path}.".startswith(tuple(f"{key}." for key in keys))
            ]
        except BaseException:
            self.close()
            raise

    def batches(self, number: int, batch_bytes: int) -> Iterator[Any]:
        """The library's batches of a row group."""
        group = self.metadata.row_group(number)
        content = max(1, sum(group.column(text).total_uncompressed_size for text in self._texts))
        average = max(1, content // max(1, group.num_rows))
        usual = max(1, min(_MOST_ROWS, batch_bytes // average))
        bounded = max(1, min(usual, _MOST_BATCH_BYTES // content))
        share = bounded < usual and bounded * average < _LEAST_BATCH_BYTES
        how = {"row_groups": [number], "columns": self.keys, "use_threads": False}
        return iter(self._file(share=share).iter_batches(batch_size=usual if share else bounded, **how))

    def close(self) -> None:
        """Close the file."""
        for file in (self._plain, self._sharing):
            if file is not None:
                file.close()

    def _file(self, *, share: bool) -> Any:
        if share and self._sharing is None:
            paths = [self._plain.schema.column(text).path for text in self._texts]
            self._sharing = _open(self.path, read_dictionary=paths, metadata=self.metadata)
        return self._sharing if share else self._plain


def _group_rows(
    batches: Iterator[Any], file: _File, number: int, batch_bytes: int, row: int, first: int
) -> Iterator[Rows]:
    """The rows of one row group, which begins with row ``row``, from row ``first`` on."""
    path, keys, total = file.path, file.keys, max(1, file.metadata.num_rows)
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            for begin, end in _stretches(batch, keys, batch_bytes, path, row):
                if row + end > first:
                    begin = max(begin, first - row)
                    columns = tuple(batch.column(key).slice(begin, end - begin).to_pylist() for key in keys)
                    yield Rows(row + begin, columns, (row + end) / total)
        except UnicodeDecodeError as error:
            message = f"{path}, rows {row + begin + 1} to {row + end}: the text is not UTF-8 ({error.reason})"
            raise DataError(message, remedy="write the column as UTF-8 text") from error
        except (OSError, ValueError, NotImplementedError) as error:  # all that the library raises
            raise _damaged(path, f"row group {number}", error) from error
        row += len(batch)


def _stretches(
    batch: Any, keys: Sequence[str], batch_bytes: int, path: str, row: int
) -> Iterator[tuple[int, int]]:
    """Rows from and to of a batch, each stretch of about ``batch_bytes`` of text: what the library keeps once
    for many rows becomes a copy for each of them.
    """
    sizes = [sum(each) for each in zip(*(_text_bytes(batch.column(key)) for key in keys), strict=True)]
    begin = passed = 0
    for end, until in enumerate(accumulate(sizes), start=1):
        if sizes[end - 1] > MOST_VALUE_BYTES:
            message = (
                f"{path}, row {row + end}: the text has {sizes[end - 1]} bytes, which is more than the limit"
            )
            raise DataError(message, remedy=f"split the text into parts of at most {MOST_VALUE_BYTES} bytes")
        if until - passed >= batch_bytes:
            yield begin, end
            begin, passed = end, until
    if begin < len(sizes):
        yield begin, len(sizes)


def _text_bytes(column: Any) -> list[int]:
    """The bytes of text in each row; 0 for what is not text."""
    import pyarrow  # type: ignore[import]
    from pyarrow import compute

    if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
        values = _text_bytes(column.flatten())
        ends = list(accumulate(values, initial=0))
        counts = [count or 0 for count in compute.list_value_length(column).to_pylist()]
        places = list(accumulate(counts, initial=0))
        return [ends[end] - ends[begin] for begin, end in pairwise(places)]
    if pyarrow.types.is_dictionary(column.type):
        lengths = _text_bytes(column.dictionary)
        return [0 if place is None else lengths[place] for place in column.indices.to_pylist()]
    if any(
        is_text(column.type)
        for is_text in (
            pyarrow.types.is_string,
            pyarrow.types.is_large_string,
            pyarrow.types.is_binary,
            pyarrow.types.is_large_binary,
        )
    ):
        return [length or 0 for length in compute.binary_length(column).to_pylist()]
    return [0] * len(column)


def _open(path: str, **how: Any) -> Any:
    try:
        import pyarrow.parquet  # type: ignore[import]
    except ImportError as error:
        raise HostError(
            f"{path}: reading Parquet files needs the pyarrow library", remedy="run: pip install pyarrow"
        ) from error
    try:
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER, **how)
    except (OSError, ValueError, NotImplementedError) as error:
        raise _damaged(path, "footer", error) from error


def _check_columns(path: str, keys: Sequence[str], names: Sequence[str]) -> None:
    for key in keys:
        if key not in names:
            present = ", ".join(map(repr, names)) or "none"
            message = f"{path}: there is no column {key!r} (columns present: {present})"
            raise DataError(message, remedy="give the column of the text with --json-keys KEY")
        if names.count(key) > 1:
            message = f"{path}: the file has {names.count(key)} columns with the name {key!r}"
            raise DataError(message, remedy="write the file again with one name for each column")


def _damaged(path: str, place: str, error: Exception) -> DataError:
    reason = str(error).strip().split("\n", 1)[0]
    message = f"{place} of {path} cannot be read: {reason}"
    return DataError(
        message, remedy=("download or write the file again; it is truncated, damaged or not Parquet")
    )
