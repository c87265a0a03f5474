"""The progress of an unfinished run, on disk, so that another run can continue: one line of JSON at the
start, one at each save, and one wherever a run continued with inputs that were changed after what was read.

A line counts once all of it is there; the files that it describes are synced to disk before it is written.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from megatron_hyperrouter.data.store.pair_writer import refusing, sync_folder
from megatron_hyperrouter.errors import ConfigError, DataError, Problem

_VERSION = 2
_START = b'{"version": '
_AFRESH = "or add --overwrite to start from the beginning"

# (number of an input, the records) -> whether what was read of the input is unchanged
Unchanged = Callable[[int, list[dict[str, Any]]], bool]


class Journal:
    """The journal at ``path``, locked against a second process.

    ``settings``: flags and values that decide the bytes of the output.  ``inputs``: path, size and time of
    change of each file. ``records`` contains what an earlier run saved, oldest first.  ``overwrite``: forget
    that; ``forgotten`` are the settings of that run. Raises ConfigError if that run had other settings,
    DataError if another process is at work, or if an input has changed since; but ``unchanged`` can accept
    changes after the part that was read, whose paths are then in ``mended``.
    """

    def __init__(
        self,
        path: str,
        settings: Mapping[str, object],
        inputs: list[tuple[str, int, int]],
        *,
        overwrite: bool = False,
        unchanged: Unchanged = lambda number, records: False,
    ) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.mended: list[str] = []
        with refusing(path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._stream = _locked(path)
        fresh = not os.fstat(self._stream.fileno()).st_size
        try:
            head = {
                "version": _VERSION,
                "settings": dict(settings),
                "inputs": [list(each) for each in inputs],
            }
            self._check_start()
            lines = self._read()
            self.forgotten: dict[str, object] = {}
            if overwrite and lines and _is_head(lines[0]):
                self.forgotten = lines[0]["settings"]
            if lines and not overwrite:
                self._continue(lines, json.loads(json.dumps(head)), unchanged)
            else:
                with refusing(path):
                    self._stream.truncate(0)
                self.append(head)
                sync_folder(path)
        except BaseException:
            self.close(remove=fresh)
            raise

    def append(self, record: Mapping[str, object]) -> None:
        """Add a line, durably."""
        with refusing(self.path):
            self._stream.write(json.dumps(record).encode() + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def close(self, *, remove: bool) -> None:
        """Release the lock; ``remove``: nothing is left to continue with."""
        if remove:
            with suppress(OSError):  # if it stays, the next run can handle it
                Path(self.path).unlink()
        with suppress(OSError):  # a full disk refuses the last line once more
            self._stream.close()

    def _check_start(self) -> None:
        """DataError for another file with this name, which must not be lost; an incomplete first line of
        our own is not another file.
        """
        self._stream.seek(0)
        start = self._stream.read(len(_START))
        if start.strip(b"\0") and not _START.startswith(start):
            message = (
                f"{self.path}: preprocessing saves its progress under this name, but another file "
                "already has it"
            )
            raise DataError(message, remedy="move this file away, or choose another --output-prefix")

    def _read(self) -> list[dict[str, Any]]:
        """The complete lines; a line that a crash left incomplete is removed."""
        self._stream.seek(0)
        lines: list[dict[str, Any]] = []
        whole = 0
        for line in self._stream:
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                break
            lines.append(record)
            whole += len(line)
        with refusing(self.path):
            self._stream.truncate(whole)
        return lines

    def _continue(self, lines: list[dict[str, Any]], head: dict[str, Any], unchanged: Unchanged) -> None:
        """Take over the records of an earlier run."""
        old = lines[0] | next((line for line in reversed(lines[1:]) if "inputs" in line), {})
        self._check(old, head)
        self.records = [line for line in lines[1:] if "inputs" not in line]
        for number, (was, found) in enumerate(zip(old["inputs"], head["inputs"], strict=True)):
            if was != found:
                if was[0] != found[0] or not unchanged(number, self.records):
                    raise self._changed(was, found)
                self.mended.append(found[0])
        if self.mended:
            self.append({"inputs": head["inputs"]})

    def _check(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        if old.get("version") != new["version"]:
            message = f"{self.path}: another version of this program wrote this file"
            raise DataError(message, remedy="add --overwrite to start from the beginning")
        if not _is_head(old):
            message = f"{self.path}: its first line is damaged"
            raise DataError(message, remedy="add --overwrite to start from the beginning")
        before, now = old["settings"], new["settings"]
        problems = []
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                rule = f"differs from {before.get(name)} in the unfinished run that wrote {self.path}"
                problems.append(
                    Problem(name, now.get(name), rule, f"use the same value to continue, {_AFRESH}")
                )
        if problems:
            raise ConfigError(problems)
        if len(old["inputs"]) != len(new["inputs"]):
            message = (
                f"the number of input files is {len(new['inputs'])}, but was {len(old['inputs'])} in "
                f"the unfinished run that wrote {self.path}"
            )
            raise DataError(message, remedy=f"use the same --input files, {_AFRESH}")

    def _changed(self, was: list[Any], found: list[Any]) -> DataError:
        if was[0] != found[0]:
            message = f"{found[0]}: the unfinished run that wrote {self.path} read {was[0]} instead"
            return DataError(message, remedy=f"use the same --input files, {_AFRESH}")
        sizes = f" (it had {was[1]} bytes and now has {found[1]})" if was[1] != found[1] else ""
        return DataError(
            f"{found[0]}: the input has changed since the unfinished run that wrote {self.path}{sizes}",
            remedy=f"restore the input, {_AFRESH}",
        )


def _is_head(line: dict[str, Any]) -> bool:
    """Whether the first line has the types that :class:`Journal` writes."""
    settings, inputs = line.get("settings"), line.get("inputs")
    if not isinstance(settings, dict) or not isinstance(inputs, list):
        return False
    return all(
        isinstance(each, list) and [type(value) for value in each] == [str, int, int] for each in inputs
    )


@contextmanager
def locked_output(output_prefix: str) -> Iterator[None]:
    """Keep other processes away from an output that cannot be continued.  DataError if another process is
    writing it, or has left unfinished files.
    """
    path = f"{output_prefix}.journal"
    stream = _locked(path)
    unused = not os.fstat(stream.fileno()).st_size
    try:
        if not unused:
            remedy = "finish that run with the same command, or remove the file"
            raise DataError(
                f"{path} belongs to an unfinished preprocessing run with this output", remedy=remedy
            )
        yield
    finally:
        if unused:
            with suppress(OSError):
                Path(path).unlink()
        stream.close()


def _locked(path: str) -> BinaryIO:
    """The journal, open and locked; opened again where the process that held the lock has removed it
    meanwhile.
    """
    while True:
        with refusing(path):
            stream = open(path, "a+b")  # noqa: SIM115 - holds the lock until close()
        try:
            _lock(stream, path)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(stream.fileno()), os.stat(path)):
                    return stream
        except BaseException:
            stream.close()
            raise
        stream.close()


def _lock(stream: BinaryIO, path: str) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"{path}: another process is writing these files"
        raise DataError(message, remedy="wait for that process, or choose another --output-prefix") from error
    except OSError:
        return  # a file system without locks
