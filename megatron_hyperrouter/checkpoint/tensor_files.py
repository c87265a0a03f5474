"""safetensors files, read and written one tensor at a time, so that a model of any size needs the memory
of its largest tensor.

The safetensors library maps whole files into memory when it reads, and keeps a second copy of all tensors
when it writes. The format is an eight-byte length, a JSON header (name -> dtype, shape, offsets) and the
bytes.  Reading headers needs only the standard library, so that a downloaded folder can be checked on any
machine.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CHUNK = 1 << 22


class TensorEntry(NamedTuple):
    """A tensor in a file."""

    name: str
    dtype: str  # F32, BF16, ...
    shape: tuple[int, ...]
    begin: int  # of its bytes, from the beginning of the file
    end: int


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of a file, in the order of their bytes; ValueError if it is not a whole safetensors
    file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError("the file is too short for a safetensors header")
        (length,) = struct.unpack("<Q", start)
        if 8 + length > size:
            raise ValueError("the safetensors header is cut off")
        header = json.loads(file.read(length))
    try:
        entries = [
            TensorEntry(
                name, told["dtype"], tuple(told["shape"]), *(8 + length + at for at in told["data_offsets"])
            )
            for name, told in header.items()
            if name != "__metadata__"
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("the safetensors header is damaged") from error
    if any(entry.end > size for entry in entries):
        raise ValueError("the file ends before its last tensor")
    return sorted(entries, key=lambda entry: entry.begin)


def digest_of_bytes(path: Path, begin: int = 0, end: int | None = None) -> str:
    """SHA-256 of a file, or of a range of it."""
    found = hashlib.sha256()
    left = (path.stat().st_size if end is None else end) - begin
    with path.open("rb") as file:
        file.seek(begin)
        while left > 0 and (block := file.read(min(CHUNK, left))):
            found.update(block)
            left -= len(block)
    return found.hexdigest()


def header_bytes(tensors: Iterator[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The header of a file that contains tensors of these (name, dtype, shape, bytes), one after the
    other.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, size in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return struct.pack("<Q", len(text)) + text
