"""A file of a corpus, mapped into memory or read in parts."""

from __future__ import annotations

import glob
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_hyperrouter.errors import DataError

_NAMED = 3  # prefixes that are suggested
_AROUND = 1 << 17  # bytes; Linux maps 64 kB where one of them is read


class Mapped:
    """A file as read-only bytes of memory, ``content``; a plain array, because slices of ``np.memmap`` cost
    10 times as much.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        try:
            with open(path, "rb") as stream:
                state = os.fstat(stream.fileno())
                self._identity, self.changed = _identity(state), state.st_mtime_ns
                if state.st_size:  # an empty file cannot be mapped
                    self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file", remedy=missing_pair(str(path.with_suffix("")))) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(
                f"{path} cannot be read: {reason}",
                remedy="check its permissions, and check the disk for errors",
            ) from error
        self.content: npt.NDArray[np.uint8] = np.frombuffer(self._map or b"", np.uint8)

    def read(self, parts: Sequence[tuple[int, int]]) -> list[bytes]:
        """Parts of the file: from which byte on, and how many.  They come from the map if the file under this
        name has been replaced.
        """
        try:
            with open(self.path, "rb", buffering=0) as stream:
                file = stream.fileno()
                if self._map is None or _identity(os.fstat(file)) != self._identity:
                    raise FileNotFoundError(self.path)
                # lets a cold disk work on all of them at once: six times as fast
                if hasattr(os, "posix_fadvise"):
                    for begin, length in parts:
                        os.posix_fadvise(file, begin, length, os.POSIX_FADV_WILLNEED)
                found = [os.pread(file, length, begin) for begin, length in parts]
        except OSError:
            return [self.content[begin : begin + length].tobytes() for begin, length in parts]
        for (begin, length), content in zip(parts, found, strict=True):
            if len(content) != length:
                raise self.cut(begin + len(content))
        return found

    def let_go(self, begin: int, length: int) -> None:
        """Stop counting these bytes as memory of this process; the next read maps them again."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            before = max(begin - _AROUND, 0)  # reading a page brings in those around it, too
            start = before // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, begin + length - start)

    def cut(self, byte: int) -> DataError:
        """What to raise where the file now ends at ``byte``."""
        return DataError(
            (
                f"{self.path}, byte {byte}: the file now ends here, but it had "
                f"{len(self.content)} bytes when it was opened"
            ),
            remedy=(
                "copy the .bin and the .idx file again and continue with --load; do not "
                "change these files while a run reads them"
            ),
        )

    def size_now(self) -> int:
        """The current size of the file, in bytes."""
        return self._map.size() if self._map is not None else 0


class InMemory(Mapped):
    """The same for bytes that are not in a file; ``path`` is what messages call them."""

    def __init__(self, path: str, content: bytes) -> None:
        self.path, self.changed, self._map = Path(path), 0, None
        self.content = np.frombuffer(content, np.uint8)

    def read(self, parts: Sequence[tuple[int, int]]) -> list[bytes]:
        """See the base class."""
        return [self.content[begin : begin + length].tobytes() for begin, length in parts]

    def size_now(self) -> int:
        """The number of bytes; it never changes."""
        return len(self.content)


def missing_pair(prefix: str) -> str:
    """The remedy for a missing pair: the existing pairs with a similar prefix."""
    stem = prefix.removesuffix(".bin").removesuffix(".idx")
    found = sorted(glob.glob(f"{glob.escape(stem)}*.idx"))
    names = [path.removesuffix(".idx") for path in found if os.path.exists(path.removesuffix("idx") + "bin")]
    if names:
        return f"did you mean {' or '.join(names[:_NAMED])}?"
    return "give the prefix of an existing .bin and .idx file, as mhr preprocess prints it"


def _identity(state: os.stat_result) -> tuple[int, int]:
    return state.st_dev, state.st_ino
