"""Files that appear complete or not at all, even if others can write to the folder.

A file is written under a random temporary name, which must not exist yet and is never followed if it is a
symbolic link, and then renamed. Its mode follows the umask, like that of a file made with ``open``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_hyperrouter.errors import CheckpointError, ConfigError, Problem


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """A stream whose content replaces that of ``path`` at the end of the block; after an error, ``path`` is
    unchanged.

    ``durable``: the content survives a power failure. Raises OSError if the file system refuses.
    """
    unfinished = _unfinished(path)
    try:
        with open_new(unfinished) as stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
    if durable:
        sync(path.parent)


def _unfinished(path: Path) -> Path:
    """An unpredictable temporary name next to ``path``."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")


def open_new(path: Path, *, buffering: int = -1) -> BinaryIO:
    """Create a file and open it for writing and reading; FileExistsError if the name exists, even as a
    link.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    return os.fdopen(descriptor, "w+b" if buffering else "wb", buffering)


def open_afresh(path: Path, *, buffering: int = -1) -> BinaryIO:
    """Like :func:`open_new` for a predictable name: a file that a killed run or another user left there is
    removed; a link is not followed.
    """
    path.unlink(missing_ok=True)
    return open_new(path, buffering=buffering)


def open_again(path: Path, *, buffering: int = -1) -> BinaryIO:
    """Open a file of an earlier process for writing and reading; OSError if it is a link."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    return os.fdopen(descriptor, "r+b", buffering)


def write_bytes(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Replace the content of ``path``."""
    with replacing(path, durable=durable) as stream:
        stream.write(content)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace the content of ``path`` by ``text`` in UTF-8."""
    write_bytes(path, text.encode(), durable=durable)


def write_json(path: Path, content: object) -> None:
    """Write JSON for people and programs to read, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")


def check_output(path: Path, flag: str = "--output") -> None:
    """Create the folders above ``path``; ConfigError if the file, which is written after the work, cannot be
    created.
    """
    try:
        reason = "is not a file" if path.exists() and not path.is_file() else ""
        if not reason:
            path.parent.mkdir(parents=True, exist_ok=True)
            reason = _why_not_written(path)
    except OSError as error:
        reason = _cannot_be_written(error)
    if reason:
        raise ConfigError([Problem(flag, path, reason, "name a file that you can write")])


def check_folder(path: Path, flag: str = "--output") -> None:
    """ConfigError if the folder cannot be created, or if no file can be created in it; leaves nothing."""
    try:
        nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
        reason = "" if nearest.is_dir() else f"{'is' if nearest == path else f'{nearest} is'} not a folder"
        reason = reason or _why_not_written(nearest / "trial")
    except OSError as error:
        reason = _cannot_be_written(error)
    if reason:
        raise ConfigError([Problem(flag, path, reason, "name a folder that you can write")])


def _why_not_written(path: Path) -> str:
    """Why a file beside ``path`` cannot be written; empty if it can."""
    trial = _unfinished(path)
    try:
        open_new(trial).close()
        trial.unlink()
    except OSError as error:
        return _cannot_be_written(error)
    return ""


def _cannot_be_written(error: OSError) -> str:
    return f"cannot be written: {error.strerror or error}"


@contextlib.contextmanager
def unfinished_folder(output: Path) -> Iterator[Path]:
    """A folder under a temporary name, for :func:`publish`; what is left of it at the end is removed.

    ConfigError if the output exists, or if another process is writing it.
    """
    if output.exists():
        rule = "already exists"
        raise ConfigError(
            [Problem("--output", output, rule, ("give another folder, or move this folder away"))]
        )
    draft = output.with_name(f".{output.name}.unfinished")
    locks: list[int] = []
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if draft.exists():  # of a command that was killed, unless it still has its lock
            locks.append(_locked(draft, output))
            shutil.rmtree(draft)
        draft.mkdir()
        locks.append(_locked(draft, output))
        yield draft
    except OSError as error:
        raise CheckpointError(
            f"{output} cannot be written: {error.strerror or error}",
            remedy="free up space on that disk, or give another --output",
        ) from error
    finally:
        if locks:
            shutil.rmtree(draft, ignore_errors=True)
        for lock in locks:
            os.close(lock)


def _locked(folder: Path, output: Path) -> int:
    """A descriptor with a lock on the folder, if its file system has locks; ConfigError if another process
    has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        rule, remedy = "is being written by another process", "wait until it ends, or give another folder"
        raise ConfigError([Problem("--output", output, rule, remedy)]) from None
    except OSError:  # no locks
        pass
    return descriptor


def publish(draft: Path, output: Path, *, failed: bool = False) -> Path:
    """Rename the folder to its final name, or to ``FOLDER.failed`` if ``failed``; returns that name."""
    target, number = output.with_name(f"{output.name}.failed") if failed else output, 1
    while failed and target.exists():
        number += 1
        target = output.with_name(f"{output.name}.failed-{number}")
    draft.rename(target)
    return target


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
