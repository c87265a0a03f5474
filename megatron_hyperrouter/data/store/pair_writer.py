"""Writes a pair of token files so that a process may crash at any moment and another one can continue.

An unfinished pair is three files that only grow: tokens (``.bin.partial``), the length of each sequence
(``.sizes.partial``), and the number of sequences of each document (``.counts.partial``).  A
:class:`Counts` records their ends at one moment; to continue from it, they are truncated there.  When all
tokens are written, ``.idx`` is made from the last two. Memory does not grow with the corpus.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_hyperrouter.data.store.token_files import index_header
from megatron_hyperrouter.data.text.streams import refusal
from megatron_hyperrouter.errors import DataError
from megatron_hyperrouter.files import open_afresh, open_again

_BUFFER = 1 << 20
_CHUNK = 1 << 20  # sequences handled at a time while the index is made
_SIZE = np.dtype("<i4")


class DiskRefused(DataError):
    """The output cannot be written: what is done is kept, and the same command can continue."""


@dataclass(frozen=True)
class Counts:
    """How much of a pair is written."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    open_sequences: int = 0  # sequences so far of a document that is not yet complete
    words: int = 0  # of the text that the tokens were made from

    def as_dict(self) -> dict[str, int]:
        """As a dictionary for the journal; ``Counts(**dictionary)`` restores it."""
        return asdict(self)


@dataclass(frozen=True)
class FileSum:
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


class PairWriter:
    """The growing files of one pair; ``counts``: continue from there, instead of from nothing.  Raises
    DiskRefused.
    """

    def __init__(self, prefix: str, dtype: DTypeLike, counts: Counts | None = None) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.counts = counts or Counts()
        self.digest = hashlib.sha256()  # of .bin
        self._streams: dict[str, BinaryIO] = {}
        with refusing(prefix):
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
            for ending, size in _file_sizes(self.counts, self.dtype).items():
                opened = open_again if counts else open_afresh
                stream = opened(Path(f"{prefix}.{ending}.partial"), buffering=_BUFFER)
                self._streams[ending] = stream
                if ending == "bin" and counts:
                    for block in _blocks(stream, size):
                        self.digest.update(block)
                stream.truncate(size)
                stream.seek(size)

    def write(
        self,
        tokens: NDArray[Any],
        lengths: NDArray[np.int32],
        sequences: NDArray[np.int32],
        *,
        words: int = 0,
        closes: bool = True,
    ) -> None:
        """Append documents: their tokens end to end, the length of each sequence, how many sequences each
        document has.

        ``words``: in their text.  ``closes`` false: the last document continues with the next call.
        """
        assert tokens.dtype == self.dtype
        old = self.counts
        complete, left = sequences.astype(_SIZE), old.open_sequences
        if complete.size:
            complete[0] += left
            left = 0 if closes else int(complete[-1])
            complete = complete if closes else complete[:-1]
        with refusing(self.prefix):
            self._streams["bin"].write(tokens.data)
            self._streams["sizes"].write(lengths.astype(_SIZE).data)
            self._streams["counts"].write(complete.data)
        self.digest.update(tokens.data)
        self.counts = Counts(
            old.documents + complete.size,
            old.sequences + lengths.size,
            old.tokens + tokens.size,
            left,
            old.words + words,
        )

    def save(self) -> Counts:
        """Sync to disk what is written so far, and return how much that is."""
        with refusing(self.prefix):
            for stream in self._streams.values():
                stream.flush()
                os.fsync(stream.fileno())
        return self.counts

    def close(self) -> None:
        """Close the files without removing them."""
        for stream in self._streams.values():
            try:
                stream.close()
            except OSError:
                continue  # a full disk refuses the last buffer too; what is durable is in the journal

    def bin_sum(self) -> FileSum:
        """Size and checksum of the tokens written so far."""
        return FileSum(self.counts.tokens * self.dtype.itemsize, self.digest.hexdigest())


def holds(prefix: str, dtype: DTypeLike, counts: Counts, *, complete: bool = False) -> bool:
    """Whether the growing files of a pair contain at least this much; ``complete``: the tokens may have their
    name already.
    """
    sizes = _file_sizes(counts, dtype)
    try:
        growing = Path(f"{prefix}.bin.partial")
        if complete and not growing.exists() and os.path.getsize(f"{prefix}.bin") == sizes["bin"]:
            del sizes["bin"]
        return all(os.path.getsize(f"{prefix}.{ending}.partial") >= size for ending, size in sizes.items())
    except OSError:
        return False


def put_in_place(prefix: str, dtype: DTypeLike, counts: Counts) -> FileSum:
    """Write ``.idx`` of a pair whose tokens are all written, and give both files their names; returns the
    checksum of ``.idx``.

    It may be called again after a crash.  There is never an old index with new tokens, and the index comes
    last, because its presence tells readers that the pair is complete.
    """
    partial, final = (
        {ending: Path(f"{prefix}.{ending}{more}") for ending in ("bin", "idx")} for more in (".partial", "")
    )
    with refusing(prefix):
        digest = hashlib.sha256()
        with open_afresh(partial["idx"], buffering=_BUFFER) as stream:
            for block in _index_blocks(prefix, np.dtype(dtype), counts):
                digest.update(block)
                stream.write(block)
            size = stream.tell()
            stream.flush()
            os.fsync(stream.fileno())
        if partial["bin"].exists():
            final["idx"].unlink(missing_ok=True)
            partial["bin"].replace(final["bin"])
        partial["idx"].replace(final["idx"])
        sync_folder(prefix)
    return FileSum(size, digest.hexdigest())


def changed_since(path: str) -> DataError:
    """What to raise for a growing file that does not contain what was saved in it."""
    message = f"{path}: the file has changed since an unfinished run saved it"
    return DataError(
        message,
        remedy=("run the same command again; it discards the saved progress and starts from the beginning"),
    )


def remove_partial(prefix: str) -> None:
    """Remove the growing files if possible; a failure here must not hide why the run has ended."""
    for ending in ("bin", "idx", "sizes", "counts"):
        with suppress(OSError):
            Path(f"{prefix}.{ending}.partial").unlink()


def sync_folder(path: str) -> None:
    """Make the names in the folder of ``path`` durable, where the system can."""
    folder = os.open(Path(path).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError:
        return  # some network file systems do not support this
    finally:
        os.close(folder)


class refusing:
    """Turn an OSError raised in the block into DiskRefused."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            message, remedy = refusal(error, self._prefix, "choose another --output-prefix")
            raise DiskRefused(message, remedy=remedy) from error


def _file_sizes(counts: Counts, dtype: DTypeLike) -> dict[str, int]:
    return {
        "bin": counts.tokens * np.dtype(dtype).itemsize,
        "sizes": counts.sequences * _SIZE.itemsize,
        "counts": counts.documents * _SIZE.itemsize,
    }


def _blocks(stream: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (block := stream.read(min(size, _BUFFER))):
        size -= len(block)
        yield block


def _index_blocks(prefix: str, dtype: np.dtype[Any], counts: Counts) -> Iterator[bytes]:
    """The bytes of ``.idx``: header, sizes, where each sequence begins, and document marks."""
    yield index_header(dtype, counts.sequences, counts.documents)
    files = _file_sizes(counts, dtype)
    with open(f"{prefix}.sizes.partial", "rb") as stream:
        yield from _blocks(stream, files["sizes"])
        stream.seek(0)
        yield from _starts(stream, files["sizes"], dtype.itemsize, counts.tokens, last=False)
    with open(f"{prefix}.counts.partial", "rb") as stream:
        yield from _starts(stream, files["counts"], 1, counts.sequences, last=True)


def _starts(stream: BinaryIO, size: int, scale: int, total: int, *, last: bool) -> Iterator[bytes]:
    """Where each of consecutive int32 lengths begins, as int64 bytes, in units of ``scale``; with ``last``
    also where all end.

    DataError if they do not add up to ``total``: the file is not the one that was written.
    """
    start = 0
    for _ in range(0, size, _CHUNK * _SIZE.itemsize):
        lengths = np.frombuffer(stream.read(min(size, _CHUNK * _SIZE.itemsize)), _SIZE)
        size -= lengths.nbytes
        ends = start + np.cumsum(lengths, dtype="<i8") * scale
        yield np.concatenate(([start], ends[:-1])).astype("<i8").tobytes()
        start = int(ends[-1])
    if start != total * scale:
        raise changed_since(stream.name)
    if last:
        yield np.array([start], "<i8").tobytes()
