"""A corpus from a folder: every text file below it as one JSON line."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass

from megatron_hyperrouter.data.text.streams import replacing
from megatron_hyperrouter.errors import ConfigError, DataError, Problem

_BOM = b"\xef\xbb\xbf"
_SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages"})
_HEAD = 1 << 13  # a binary file shows a NUL byte this early, and need not be read whole


@dataclass(frozen=True)
class Gathered:
    """What was written: documents, bytes of the JSON file, and files left out because they are not text."""

    documents: int
    size: int
    left_out: int


def default_root() -> str:
    """The sources of the Python standard library."""
    return sysconfig.get_path("stdlib")


def write_corpus(
    root: str,
    output: str,
    *,
    max_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Gathered:
    """Write ``{"text": ..., "source": path below root}`` for each text file, in the order of
    :func:`find_text_files`.

    ``max_bytes``: stop before the file that would make ``output`` longer.  ``progress(files done, all
    files)``. ``output`` itself is skipped, and gets its name when it is complete.  ConfigError if
    ``max_bytes`` is below 1, DataError if there is no text.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ConfigError(
            [
                Problem(
                    "--max-bytes", max_bytes, "must be at least 1", "leave out --max-bytes to take all files"
                )
            ]
        )
    own = {
        os.path.relpath(os.path.realpath(f"{output}{ending}"), os.path.realpath(root))
        for ending in ("", ".partial")
    }
    # what an earlier run left is not a source
    sources = [source for source in find_text_files(root) if source not in own]
    documents = size = left_out = 0
    with replacing(output) as stream:
        for done, source in enumerate(sources, start=1):
            text = read_text_file(os.path.join(root, source))
            if text is None:
                left_out += 1
                continue
            name = os.fsencode(source).decode(errors="replace")
            line = json.dumps({"text": text, "source": name}, ensure_ascii=False).encode() + b"\n"
            if max_bytes is not None and size + len(line) > max_bytes:
                if documents:
                    break
                continue  # too long for the whole corpus: the next may fit
            stream.write(line)
            documents, size = documents + 1, size + len(line)
            if progress:
                progress(done, len(sources))
        if not documents:
            within = "" if max_bytes is None else f" of at most {max_bytes} bytes"
            larger = "" if max_bytes is None else ", or a larger --max-bytes"
            found = f"none of the {len(sources)} files is a text file{within}"
            raise DataError(
                f"{root}: {found if sources else 'there are no files'}",
                remedy=f"choose another --root{larger}",
            )
    return Gathered(documents, size, left_out)


def find_text_files(root: str) -> list[str]:
    """Paths below ``root``, relative and with ``/``, in the order of the SHA-256 of the path.

    That order is the same everywhere, and mixes folders: a split by position then has a fair share of every
    part of the tree. Hidden entries, links, byte code and installed packages are left out; whether a file is
    text shows when it is read.
    """
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder", remedy="set --root to an existing folder")
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_refuse):
        subfolders[:] = [
            name for name in subfolders if not name.startswith(".") and name not in _SKIPPED_FOLDERS
        ]
        for name in names:
            path = os.path.join(folder, name)
            if not name.startswith(".") and not os.path.islink(path) and os.path.isfile(path):
                found.append(os.path.relpath(path, root).replace(os.sep, "/"))
    return sorted(found, key=lambda source: hashlib.sha256(os.fsencode(source)).digest())


def _refuse(error: OSError) -> None:
    """Refuse a folder that cannot be read; otherwise a part of the corpus would be missing silently."""
    if not isinstance(error, FileNotFoundError):  # removed meanwhile
        message = f"{error.filename} cannot be read: {error.strerror}"
        raise DataError(message, remedy="make the folder readable, or choose another --root") from error


def read_text_file(path: str) -> str | None:
    """The text of a file, or None if it is binary, not UTF-8, blank or unreadable."""
    try:
        with open(path, "rb") as raw:
            data = raw.read(1 << 13)
            if b"\0" in data:
                return None
            data += raw.read()
        text = data.removeprefix(_BOM).decode()
    except (OSError, UnicodeDecodeError):
        return None
    return None if "\0" in text or not text.strip() else text
