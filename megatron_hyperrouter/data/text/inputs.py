"""The input files of a corpus: names and globs, the kind of each file, and the part that one of several
machines reads.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_hyperrouter.data.text.streams import SUFFIXES, ByteStream
from megatron_hyperrouter.errors import ConfigError, DataError, Problem

Kind = Literal["json", "text", "parquet"]
BOM = b"\xef\xbb\xbf"
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_PARQUET_SUFFIXES = (".parquet", ".pq")
_HEAD = 1 << 12
_BLOCKS, _BLOCK = 16, 1 << 13  # compared to see whether two files are the same text
# The first bytes of files whose content differs from their name, or that this program does not read.
_SIGNATURES = (
    (b"\x1f\x8b", "is compressed with gzip", "give the file a name that ends in .gz"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd", "give the file a name that ends in .zst"),
    (
        b"BZh",
        "is compressed with bzip2, which is not supported",
        "decompress the file, or compress it as .gz or .zst",
    ),
    (
        b"\xfd7zXZ",
        "is compressed with xz, which is not supported",
        "decompress the file, or compress it as .gz or .zst",
    ),
    (b"PK\x03\x04", "is a zip archive", "unpack the archive, and use the files in it"),
    (b"\xff\xfe", "is UTF-16", "convert the file: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "is UTF-16", "convert the file: iconv -f UTF-16 -t UTF-8"),
    (
        b"MMIDIDX",
        "is the index of existing token files",
        "use the text from which the tokens were made",
    ),
)


@dataclass(frozen=True)
class InputRange:
    """Part ``number`` (from 1) of ``of``: the bytes of all inputs on disk, divided into ``of`` equal
    ranges.

    A JSON line or a row group of a Parquet file belongs to the part that has its first byte.  So does a
    file that cannot be read from the middle (compressed, or plain text, which is one document).  All parts
    together are the whole, in order.
    """

    number: int = 1
    of: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def stretch(self, total: int) -> tuple[int, int]:
        """First byte and end of this part."""
        return total * (self.number - 1) // self.of, total * self.number // self.of


WHOLE = InputRange()


def parse_part(text: str | None, partitions: int | None) -> InputRange:
    """``--shard I/N``, or ``--shard I`` with ``--partitions N``; ConfigError for anything else."""
    if text is None:
        if partitions in (None, 1):
            return WHOLE
        remedy = (
            "add --shard I on each machine, then run mhr merge; on a single machine, use --workers instead"
        )
        raise ConfigError(
            [
                Problem(
                    "--partitions",
                    partitions,
                    "needs --shard I, the number of the part to read",
                    remedy,
                )
            ]
        )
    match = re.fullmatch(r"([0-9]{1,9})(?:/([0-9]{1,9}))?", text)
    number, of = (int(match[1]), int(match[2] or partitions or 0)) if match else (0, 0)
    if not 1 <= number <= of or (match and match[2] and partitions not in (None, of)):
        raise ConfigError(
            [
                Problem(
                    "--shard",
                    text,
                    "must be I/N with 1 <= I <= N",
                    "write, for example, 1/4 for the first of 4 parts",
                )
            ]
        )
    return InputRange(number, of)


def expand(patterns: Sequence[str]) -> list[str]:
    """The files of all names and glob patterns: patterns in the given order, the matches of each sorted;
    ``**`` matches any depth.

    A name that exists is taken literally, with any characters in it.  DataError for a pattern without a
    match.
    """
    found: list[str] = []
    empty = []
    for pattern in patterns:
        if os.path.exists(pattern) or not glob.has_magic(pattern):
            found.append(pattern)
            continue
        matches = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        found += matches
        empty += [] if matches else [pattern]
    if empty:
        raise DataError(
            "no input file matches: " + ", ".join(empty),
            remedy="correct the pattern, and put it in quotes to keep the shell from changing it",
        )
    return found


def total_bytes(paths: Sequence[str]) -> int:
    """Size of all inputs on disk; DataError lists every input that is not a readable file, or is empty
    although its kind has a header.
    """
    bad = [path for path in paths if not (os.path.isfile(path) and os.access(path, os.R_OK))]
    if bad:
        folders = [path for path in bad if os.path.isdir(path)]
        remedy = (
            f"give files, for example '{folders[0]}/**/*.jsonl'"
            if folders
            else "set --input to files that exist and can be read"
        )
        if not folders and any(os.path.exists(path) and not os.path.isfile(path) for path in bad):
            remedy = "save the input in a regular file first; a pipe or a device cannot be read twice"
        raise DataError("no readable input file: " + ", ".join(bad), remedy=remedy)
    hollow = [
        path for path in paths if path.lower().endswith((*SUFFIXES, *_PARQUET_SUFFIXES)) and not size_of(path)
    ]
    if hollow:
        raise DataError(
            "empty file: " + ", ".join(hollow),
            remedy="download or write the file again",
        )
    return sum(map(size_of, paths))


def repeated(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Each input that repeats an earlier one, with the earlier one: the same file under any name, or a
    file with the same size and the same bytes in all compared places.
    """
    first_with: dict[object, str] = {}
    found: list[tuple[str, str]] = []
    sizes = Counter(size_of(path) for path in paths)
    for path in paths:
        status = _status_of(path)
        keys: list[object] = [(status.st_dev, status.st_ino)]
        if sizes[status.st_size] > 1 and status.st_size:
            keys.append((status.st_size, _sampled(path, status.st_size)))
        earlier = next((first_with[key] for key in keys if key in first_with), None)
        if earlier is not None:
            found.append((path, earlier))
        for key in keys:
            first_with.setdefault(key, path)
    return found


def _sampled(path: str, size: int) -> bytes:
    """A digest of blocks that are spread over a file."""
    digest = hashlib.blake2b()
    with open(path, "rb", buffering=0) as stream:
        for number in range(_BLOCKS):
            digest.update(os.pread(stream.fileno(), _BLOCK, max(size - _BLOCK, 0) * number // (_BLOCKS - 1)))
    return digest.digest()


def size_of(path: str) -> int:
    """Size of a file; DataError if it is not there any more."""
    return _status_of(path).st_size


def facts_of(path: str) -> tuple[str, int, int]:
    """Path, size and time of change of a file, by which it is known again; DataError if it is not there
    any more.
    """
    status = _status_of(path)
    return path, status.st_size, status.st_mtime_ns


def _status_of(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}",
            remedy="make the file readable, and do not move the file while this command runs",
        ) from error


def is_compressed(path: str) -> bool:
    """Whether the file is decompressed while it is read; its name decides."""
    return path.endswith(SUFFIXES)


def kind_of(path: str) -> Kind:
    """JSON lines, plain text or Parquet, as its name says; a file with another name is JSON where the text
    starts with ``{``.

    DataError if its first bytes show another kind.
    """
    raw = _raw_head(path)
    name = Path(path)
    suffix = (name.with_suffix("") if is_compressed(path) else name).suffix.lower()
    if raw.startswith(b"PAR1") or (suffix in _PARQUET_SUFFIXES and not is_compressed(path)):
        return "parquet"
    for signature, what, remedy in _SIGNATURES:
        if raw.startswith(signature) and not is_compressed(path):
            raise DataError(f"{path}, byte 0: the file {what}", remedy=remedy)
    if suffix in _JSON_SUFFIXES:
        return "json"
    with ByteStream(path) as stream:
        head = stream.read(_HEAD)
    if suffix != ".txt" and head.removeprefix(BOM).lstrip().startswith(b"{"):
        return "json"
    if b"\0" in head:
        message = f"{path}, byte {head.index(0)}: the file has a NUL byte, so it is not text"
        raise DataError(message, remedy="use JSON lines or plain text (also as .gz or .zst), or Parquet")
    return "text"


def _raw_head(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read(16)
    except OSError as error:
        raise DataError(
            f"{path} cannot be opened: {error.strerror}",
            remedy="make the file readable, or choose another file",
        ) from error
