"""Index files: arrays that one process of a node builds and all of them map into memory; a later run finds
them.

No process waits in a collective.  A process that needs a file takes a lock of its machine, builds the file
if it is still missing, and releases the lock.  A file gets its name when it is complete, so a builder that
is killed leaves nothing that could be read, and the next process builds the file.  Names are digests of
everything that the content depends on; a damaged or foreign file is built again.

    bytes 0-7     b"MHRINDEX"
    bytes 8-15    uint64  length of the header
    bytes 16-19   uint32  CRC-32 of the header
    then          header, JSON: {"key": ..., "arrays": [{"name", "dtype", "shape", "offset", "crc32"}, ...],
                                 "size": bytes of all arrays}
    then          the arrays, little-endian, each starting at a multiple of 64 bytes
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import socket
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_hyperrouter import console
from megatron_hyperrouter.errors import DataError
from megatron_hyperrouter.files import open_afresh

Arrays = dict[str, npt.NDArray[Any]]
NamedArrays = Iterator[tuple[str, npt.NDArray[Any]]]
CacheKey = Mapping[str, Any]

Names = Sequence[str]

CACHED_FROM = 2**20  # numbers; a smaller index is built faster than a file is opened
_MAGIC = b"MHRINDEX"
_START = struct.Struct("<8sQI")
_ALIGN = 64
_SILENCE = 60.0  # seconds of waiting before a message says so
_CHUNK = 1 << 18  # bytes at a time: they are still in a core's cache when they are written
_ROOM = 1 << 12  # bytes for the description of the arrays
_LONGEST_HEADER = 1 << 24
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass
class IndexCache:
    """The place of index files: ``folder``, else ``cache/hyperrouter`` next to the data, else
    ``fallback``, else memory.

    ``used``: the files that were found or built, in order.
    """

    folder: str | None = None
    fallback: str | None = None
    cached_from: int = CACHED_FROM
    used: list[Path] = field(default_factory=list)

    def arrays(
        self, key: CacheKey, names: Names, build: Callable[[], NamedArrays], *, beside: str, numbers: int
    ) -> Arrays:
        """The arrays called ``names`` that ``build`` makes for ``key`` (values that JSON supports), with
        ``numbers`` numbers in total, for the data file ``beside``.

        An array that ``build`` yields is written before the next one is requested, so they need not all be
        in memory.
        """
        if numbers < self.cached_from:
            return dict(build())
        name = (
            hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest() + ".index"
        )
        paths = [folder / name for folder in self._folders(beside)]
        for path in paths:  # an existing file can be read without a lock and without write access
            found = _load(path, key, names)
            if found is not None:
                self.used.append(path)
                return found
        refused = ""
        for path in paths:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with _locked(path.with_suffix(".lock")):
                    found = _load(path, key, names) or _build(path, key, names, build)
                self.used.append(path)
                return found
            except OSError as error:
                refused = f"{path} cannot be written: {error.strerror or error}"
        console.warn(f"{refused}; every process builds its own copy of the index in memory instead")
        return dict(build())

    def _folders(self, beside: str) -> list[Path]:
        if self.folder is not None:
            return [Path(self.folder)]
        own = Path(beside).resolve().parent / "cache" / "hyperrouter"
        return [own] if self.fallback is None else [own, Path(self.fallback)]


def file_identity(path: Path) -> CacheKey:
    """What identifies a version of a file: name, size, time of change, and a digest of its first and last
    bytes.
    """
    try:
        with open(path, "rb") as stream:
            state = os.fstat(stream.fileno())
            ends = stream.read(4096)
            stream.seek(max(state.st_size - 4096, 0))
            ends += stream.read(4096)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}",
            remedy="check its permissions, and check the disk for errors",
        ) from error
    digest = hashlib.blake2b(ends, digest_size=16).hexdigest()
    return {"name": path.name, "size": state.st_size, "changed": state.st_mtime_ns, "digest": digest}


def _build(path: Path, key: CacheKey, names: Names, build: Callable[[], NamedArrays]) -> Arrays:
    """Make the arrays and put them in place; only the holder of the lock comes here."""
    mine = f".{path.stem}.{socket.gethostname()}-"
    for dead in path.parent.glob(f"{mine}*.partial"):  # any other builder on this machine would hold the lock
        dead.unlink(missing_ok=True)
    partial = path.with_name(f"{mine}{os.getpid()}.partial")
    try:
        _write(partial, key, build())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return _load(path, key, names, written_here=True) or dict(build())


def _write(path: Path, key: CacheKey, arrays: NamedArrays) -> None:
    """Not synced to disk: after a crash of the machine, the checksums reveal a damaged file, which is then
    built again.
    """
    entries: list[dict[str, Any]] = []
    # of the header, which is known last
    offset, length = (
        0,
        -(-len(json.dumps(key)) // _ROOM) * _ROOM + _ROOM,
    )
    base = _base(length)
    with open_afresh(path, buffering=0) as stream:
        for name, array in arrays:
            offset += -offset % _ALIGN
            stream.seek(base + offset)
            entry = {
                "name": name,
                "dtype": array.dtype.newbyteorder("<").str,
                "shape": array.shape,
                "offset": offset,
            }
            entries.append(entry | {"crc32": _write_array(stream, array)})
            offset += array.nbytes
            del array
        stream.truncate(base + offset)
        header = json.dumps({"key": key, "arrays": entries, "size": offset}).encode().ljust(length)
        if len(header) > length:
            raise ValueError(f"the header of {len(entries)} arrays needs more than {_ROOM} bytes")
        stream.seek(0)
        stream.write(_START.pack(_MAGIC, length, zlib.crc32(header)) + header)


def _write_array(stream: Any, array: npt.NDArray[Any]) -> int:
    """Write the bytes; returns their CRC-32."""
    content, crc = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, 0
    for begin in range(0, len(content), _CHUNK):
        piece = content[begin : begin + _CHUNK]
        crc = zlib.crc32(piece, crc)
        while len(piece):
            piece = piece[stream.write(piece) or 0 :]
    return crc


@dataclass(frozen=True)
class _Entry:
    """The position and the type of an array in the file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    crc32: int

    @property
    def count(self) -> int:
        """Numbers in the array."""
        return math.prod(self.shape)


def _load(path: Path, key: CacheKey, names: Names, *, written_here: bool = False) -> Arrays | None:
    """The arrays of a file, mapped; None if it is missing, damaged, or has another key or other arrays.
    ``written_here``: by this very process.
    """
    try:
        with open(path, "rb", buffering=0) as stream:
            entries = _read_header(stream, key, names)
            if not written_here and not all(_is_sound(stream, entry) for entry in entries):
                return None
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return {
            each.name: np.frombuffer(mapped, each.dtype, each.count, each.start).reshape(each.shape)
            for each in entries
        }
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError, struct.error):
        return None


def _read_header(stream: Any, key: CacheKey, names: Names) -> list[_Entry]:
    """What the header says; ValueError for one that this program does not write for this key."""
    size = os.fstat(stream.fileno()).st_size
    magic, length, crc = _START.unpack(stream.read(_START.size))
    if magic != _MAGIC or length > min(size, _LONGEST_HEADER):
        raise ValueError("not an index file")
    content, base = stream.read(length), _base(length)
    if zlib.crc32(content) != crc:
        raise ValueError("the header is damaged")
    header = json.loads(content)
    if header["key"] != json.loads(json.dumps(key)) or base + header["size"] != size:
        raise ValueError("the file was built for other data or settings, or it is truncated")
    entries = [
        _Entry(
            each["name"], np.dtype(each["dtype"]), tuple(each["shape"]), base + each["offset"], each["crc32"]
        )
        for each in header["arrays"]
    ]
    for entry in entries:
        whole = all(isinstance(side, int) and side >= 0 for side in (*entry.shape, entry.start - base))
        if entry.dtype.kind not in "iu" or not whole:
            raise ValueError(f"{entry.name} is not an array of integers")
        if entry.start + entry.count * entry.dtype.itemsize > size:
            raise ValueError(f"{entry.name} is outside the file")
    if tuple(entry.name for entry in entries) != tuple(names):
        raise ValueError("the file does not have the expected arrays")
    return entries


def _is_sound(stream: Any, entry: _Entry) -> bool:
    """Whether an array is what was written.  It is read, not mapped: mapped pages count as memory of this
    process.
    """
    left, crc, buffer = entry.count * entry.dtype.itemsize, 0, memoryview(bytearray(_CHUNK))
    stream.seek(entry.start)
    while left:
        wanted = min(left, _CHUNK)
        # one read of a regular file returns all requested bytes
        if stream.readinto(buffer[:wanted]) != wanted:
            return False
        crc, left = zlib.crc32(buffer[:wanted], crc), left - wanted
    return crc == entry.crc32


def _base(length: int) -> int:
    return -(-(_START.size + length) // _ALIGN) * _ALIGN


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Within this context, no other process of this machine has this lock; the system releases it when the
    process ends in any way.

    If the file system has no locks, a file with the same meaning in a folder of the machine is locked.
    """
    try:
        import fcntl
    except ImportError:  # no such locks here: two processes may build the same file, and one of them wins
        yield
        return
    digest = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=16).hexdigest()
    local = Path(tempfile.gettempdir()) / f"megatron_hyperrouter-{os.getuid()}-{digest}.lock"
    for place in (path, local):
        with open(place, "ab") as stream:
            waiting = threading.Timer(
                _SILENCE,
                console.note,
                [f"waiting for another process that is building {path.with_suffix('.index')}"],
            )
            waiting.daemon = True
            waiting.start()
            try:
                fcntl.flock(stream, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS or place == local:
                    raise
                continue
            finally:
                waiting.cancel()
            yield
            return
