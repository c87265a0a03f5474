"""Text files: read as one stream of bytes, decompressed according to their name (plain, .gz, .zst);
written atomically.
"""

from __future__ import annotations

import errno
import fcntl
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megatron_hyperrouter.errors import DataError, HostError
from megatron_hyperrouter.files import open_afresh, open_again

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SUFFIXES = (".gz", ".zst")
_FILE_BUFFER = 1 << 18
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LARGEST_WINDOW = (
    1 << 31
)  # bytes: what "zstd --long=31" and "--ultra" need; memory is used as far as text fills it
_ZSTD_INPUT = 1 << 14  # fed at a time, so that a highly compressed file cannot fill memory with one call


def refusal(error: OSError, path: str, instead: str) -> tuple[str, str]:
    """Message and remedy where ``path`` cannot be written; ``instead``: what else the user can do."""
    mend = "free up space on that disk" if error.errno in _NO_ROOM else "make that folder writable"
    if error.errno == errno.ENAMETOOLONG:
        mend = "shorten that name"
    return f"{error.filename or path} cannot be written: {error.strerror or error}", f"{mend}, or {instead}"


@contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A binary file to write. If the block succeeds, the file gets the name ``path``; otherwise it is
    removed.

    DataError if the disk refuses, if another process is writing ``path``, or if it exists and is not a file.
    """
    if not Path(path).name or (os.path.exists(path) and not os.path.isfile(path)):
        raise DataError(
            (f"{path or repr(path)} cannot be written, because it is not a file"),
            remedy="choose another output",
        )
    partial = Path(f"{path}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with _open_locked(partial, path) as stream:
            try:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except OSError as error:
        message, remedy = refusal(error, path, "choose another output; the existing file was not changed")
        raise DataError(message, remedy=remedy) from error


def _open_locked(partial: Path, path: str) -> BinaryIO:
    """A new file under a temporary name, locked; DataError if another process is writing the one that is
    there.
    """
    try:
        with open_again(partial) as left:  # by a process that was killed, if no process has locked it
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"{path}: another process is writing this file"
        raise DataError(message, remedy="wait for that process, or choose another output") from error
    except OSError:
        pass  # there is no such file, or this file system has no locks
    stream = open_afresh(partial)
    with suppress(OSError):
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return stream


class ByteStream(io.BufferedReader):
    """The decompressed bytes of a file; damage is a DataError that names the file."""

    def __init__(self, path: str) -> None:
        self._file = _DecompressedFile(path)
        super().__init__(self._file, buffer_size=_FILE_BUFFER)

    def disk_position(self) -> int:
        """Number of bytes of the file on disk that were read so far."""
        return self._file.on_disk.tell()


class _DecompressedFile(io.RawIOBase):
    """Raw half of ByteStream: turns every library's way to say "damaged" into one error."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self.on_disk = io.FileIO(path)
        except OSError as error:
            raise DataError(
                f"{path} cannot be opened: {error.strerror}",
                remedy="make the file readable, or choose another file",
            ) from error
        self._inner: gzip.GzipFile | io.RawIOBase = self.on_disk
        if path.endswith(".gz"):
            self._inner = gzip.GzipFile(fileobj=self.on_disk)
        elif path.endswith(".zst"):
            self._inner = _ZstdFile(self.on_disk)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        try:
            return self._inner.readinto(buffer) or 0
        except (OSError, EOFError, zlib.error) as error:
            message = f"{self._path} cannot be read beyond byte {self.on_disk.tell()}: {error}"
            raise DataError(
                message, remedy="download or compress the file again; it is truncated or damaged"
            ) from error

    def close(self) -> None:
        self.on_disk.close()
        super().close()


class _ZstdFile(io.RawIOBase):
    """A .zst file of any number of frames; unlike the library's own reader it refuses a truncated one
    (EOFError).
    """

    def __init__(self, raw: io.FileIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise HostError(
                "reading .zst files needs the zstandard library", remedy="run: pip install zstandard"
            ) from error
        self._raw = raw
        self._library = zstandard
        self._frame = self._new_frame()
        self._inside = False  # the present frame has begun
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")
        while not self._ready:
            if not self._fill():
                return 0
        size = min(len(target), len(self._ready))
        target[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _new_frame(self) -> Any:
        return self._library.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()

    def _fill(self) -> bool:
        """Decompress some more into ``_ready``; False at the end of the file."""
        data = b""
        if self._frame.eof:
            data = self._frame.unused_data
            self._frame, self._inside = self._new_frame(), False
        data = data or self._raw.read(_ZSTD_INPUT)
        if not data:
            if self._inside:
                raise EOFError("the file ends inside a compressed frame")
            return False
        self._inside = True
        try:
            self._ready = memoryview(self._frame.decompress(data))
        except self._library.ZstdError as error:
            raise OSError(str(error)) from error
        return True
