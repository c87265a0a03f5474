"""Parquet files as a bounded stream of rows, with the optional library ``pyarrow``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hyperrouter.errors import DataError, HostError

_MOST_ROWS = 4096  # in one batch
_BUFFER = (
    1 << 20
    # bytes of the file read ahead for a column; without it the reader takes the whole column of a row
    # group at once
)


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
    """The rows of the row groups that are ``owned``, in order, from row ``first`` on, about
    ``batch_bytes`` of text at a time.

    ``owned(fraction)``: where in the file a row group begins, 0 to 1.  One row group at a time is open,
    and of that a few pages. DataError for a file that is truncated, damaged, foreign or lacks a column;
    HostError where the library is missing.
    """
    file = _open(path)
    try:
        _check_columns(path, keys, file.schema_arrow.names)
        groups, before = file.metadata.num_row_groups, 0
        for number in range(groups):
            group = file.metadata.row_group(number)
            if owned(number / groups) and before + group.num_rows > first:
                size = max(1, min(_MOST_ROWS, batch_bytes * group.num_rows // max(1, group.total_byte_size)))
                yield from _group_rows(file, path, number, list(keys), size, before, first)
            before += group.num_rows
    finally:
        file.close()


def _group_rows(
    file: Any, path: str, number: int, keys: list[str], size: int, row: int, first: int
) -> Iterator[Rows]:
    """The rows of one row group, which begins with row ``row``, from row ``first`` on."""
    total = max(1, file.metadata.num_rows)
    batches = iter(file.iter_batches(batch_size=size, row_groups=[number], columns=keys, use_threads=False))
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            skipped = max(0, first - row)
            columns = (
                ()
                if skipped >= len(batch)
                else tuple(batch.column(key).slice(skipped).to_pylist() for key in keys)
            )
        except UnicodeDecodeError as error:
            message = f"{path}, rows {row + 1} to {row + size}: not UTF-8 ({error.reason})"
            raise DataError(message, remedy="write the column as UTF-8 text") from error
        except (
            OSError,
            ValueError,
            NotImplementedError,
        ) as error:  # every error of the library is one of these
            raise _damaged(path, f"row group {number}", error) from error
        row += len(batch)
        if columns:
            yield Rows(row - len(columns[0]), columns, row / total)


def _open(path: str) -> Any:
    try:
        import pyarrow.parquet  # type: ignore[import]
    except ImportError as error:
        raise HostError(
            f"{path}: reading Parquet files needs the library pyarrow", remedy="pip install pyarrow"
        ) from error
    try:
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)
    except (OSError, ValueError, NotImplementedError) as error:
        raise _damaged(path, "footer", error) from error


def _check_columns(path: str, keys: Sequence[str], names: Sequence[str]) -> None:
    for key in keys:
        if key not in names:
            present = ", ".join(map(repr, names)) or "none"
            message = f"{path}: no column {key!r}; columns present: {present}"
            raise DataError(message, remedy="name the column that holds the text: --json-keys KEY")


def _damaged(path: str, place: str, error: Exception) -> DataError:
    reason = str(error).strip().split("\n", 1)[0]
    message = f"{path}, {place}: cannot be read: {reason}"
    return DataError(message, remedy="the file is truncated, damaged or no Parquet: fetch or write it again")
