"""What a run has left in its folder: events, heartbeats, the lock, and the steps it has taken."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hyperrouter.errors import ConfigError, DataError, Problem
from megatron_hyperrouter.guard import heartbeat, run_lock
from megatron_hyperrouter.guard.events import CLOSING, FILE, OPENING
from megatron_hyperrouter.guard.heartbeat import Beat
from megatron_hyperrouter.watch.checked import checked

_RECENT = 100  # steps that the present speed is taken from
_TAIL = 4 << 20  # bytes in which the last lines of metrics.jsonl are looked for
_BEGIN = rb'^(?:\xef\xbb\xbf)?\{"step": (\d{1,15}),'  # an editor may have added a byte-order mark
_STEP = re.compile(_BEGIN + rb' .*?"step_time": (\d+\.?\d*(?:e[+-]?\d+)?)', re.MULTILINE)
_LINE = re.compile(_BEGIN, re.MULTILINE)
_TOKENS = re.compile(rb'"tokens_per_second": (\d+\.?\d*(?:e[+-]?\d+)?)')
Event = dict[str, Any]


@dataclass(frozen=True)
class Steps:
    """The steps in ``metrics.jsonl``."""

    last: int = 0
    trained: float = 0.0  # seconds in all steps
    step_times: tuple[float, ...] = ()  # of the last steps
    speed: float | None = None  # tokens a second over them
    since: float = 0.0  # seconds in the steps of the newest attempt


@dataclass(frozen=True)
class Trace:
    """Everything that shows the state of a run, read at one moment."""

    run_dir: Path
    now: float  # by the clock of the file server
    events: list[Event]
    beats: dict[int, Beat]  # of the newest attempt
    silent: dict[int, float]  # seconds since each of them was written
    held: bool | None  # whether a run has locked the folder; None if this machine cannot find out
    holder: dict[str, object]
    held_since: float | None
    last_step: float | None  # when metrics.jsonl was written
    steps: Steps
    repeated: float  # seconds in steps that were taken again after a restart
    notes: tuple[str, ...]  # what could not be read

    @property
    def opening(self) -> Event | None:
        """The event with which the newest attempt began."""
        return next((each for each in reversed(self.events) if each["event"] in OPENING), None)

    @property
    def closing(self) -> Event | None:
        """The first event with which the newest attempt ended: the cause of those that follow."""
        found = None
        for each in reversed(self.events):
            if each["event"] in OPENING:
                break
            found = each if each["event"] in CLOSING else found
        return found


def read_trace(run_dir: Path) -> Trace:
    """Read the folder; ConfigError if it contains no run, DataError if a file cannot be used."""
    if not run_dir.is_dir():
        rule = "must be the folder of a run" if run_dir.exists() else "does not exist"
        raise ConfigError([Problem("RUN", run_dir, rule, "give the --run-dir of a run")])
    events, notes = _events(run_dir / FILE)
    if not events and not (run_dir / run_lock.LOCK).exists():
        rule = f"has no {FILE}, so it is not a run folder"
        raise ConfigError([Problem("RUN", run_dir, rule, "give the --run-dir of a run that has started")])
    openings = [each for each in events if each["event"] in OPENING]
    now = _now(run_dir)
    beats, silent = _beats(run_dir / heartbeat.FOLDER, openings[-1] if openings else {}, now)
    steps = read_steps(run_dir / "metrics.jsonl", after=int(openings[-1]["step"]) if openings else 0)
    try:
        repeated = read_steps(run_dir / "metrics-earlier.jsonl", after=0).trained
    except DataError as error:  # it may contain what made an attempt set the file aside
        notes.append(error.message)
        repeated = 0.0
    holder = run_lock.holder_of(run_dir)
    return Trace(
        run_dir,
        now,
        events,
        beats,
        silent,
        held=run_lock.is_held(run_dir),
        holder=holder,
        held_since=_written(run_dir / run_lock.HOLDER),
        last_step=_written(run_dir / "metrics.jsonl"),
        steps=steps,
        repeated=repeated,
        notes=tuple(notes),
    )


def read_steps(path: Path, *, after: int) -> Steps:
    """The steps of a metrics file, which may have a hundred thousand; none if there is no file."""
    trained, last, since, recent = 0.0, 0, 0.0, b""
    times: list[float] = []
    for step, seconds in _step_times(path):
        trained += seconds
        last = step
        since += seconds if step > after else 0.0
        times.append(seconds)
        if len(times) > 2 * _RECENT:
            del times[:_RECENT]
    if not times:
        return Steps()
    with _readable(path), path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
        recent = file.read()
    last = max([last, *map(int, _LINE.findall(recent))])  # a skipped step has no time
    times = times[-_RECENT:]
    speeds = [float(word) for word in _TOKENS.findall(recent)][-_RECENT:]
    paired = list(zip(times[::-1], speeds[::-1], strict=False))
    tokens = sum(seconds * speed for seconds, speed in paired)
    speed = tokens / sum(seconds for seconds, _ in paired) if paired else None
    return Steps(last, trained, tuple(times), speed, since)


def _step_times(path: Path) -> Iterator[tuple[int, float]]:
    if not path.exists():
        return
    with _readable(path), path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = False
            for match in _STEP.finditer(content):
                found = True
                if math.isfinite(seconds := float(match[2])):
                    yield int(match[1]), seconds
            if not found and b'"split"' not in content[:_TAIL] and b'"skipped"' not in content[:_TAIL]:
                raise _damaged(path, "it contains no training step")


def _events(path: Path) -> tuple[list[Event], list[str]]:
    """The events, and a note where lines could not be read: a kill may have left a line half-written."""
    if not path.exists():
        return [], []
    with _readable(path):
        lines = path.read_bytes().splitlines()
    found: list[Event] = []
    bad: list[int] = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(checked(json.loads(line)))
        except (ValueError, RecursionError):
            bad += [number] if line.strip() else []
    if bad and not found:
        raise _damaged(path, f"it contains no valid event; the first invalid line is line {bad[0]}")
    if not bad:
        return found, []
    shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
    which = (
        f"line {shown} cannot be read and is" if len(bad) == 1 else f"lines {shown} cannot be read and are"
    )
    return found, [f"{path.name}: {which} ignored"]


def _beats(folder: Path, opening: Event, now: float) -> tuple[dict[int, Beat], dict[int, float]]:
    """Beats of the newest attempt: an earlier one may have had more ranks, and left their files."""
    begun, ranks = float(opening.get("time", 0.0)), int(opening.get("world_size", 1 << 30))
    beats = {
        rank: beat
        for rank, beat in heartbeat.read_beats(folder).items()
        if rank < ranks and beat.time > begun - 2 * beat.every
    }
    written = {rank: _written(heartbeat.file_of(folder, rank)) for rank in beats}
    return beats, {rank: max(0.0, now - (when or now)) for rank, when in written.items()}


def _written(path: Path) -> float | None:
    """When the file was written, by the clock of the file server; None if there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _now(run_dir: Path) -> float:
    """The time by the clock that stamps the files; a file without a name shows it."""
    try:
        with tempfile.TemporaryFile(dir=run_dir) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:  # this user cannot write there
        return time.time()


def is_here(holder: dict[str, object]) -> bool:
    """Whether the holder is on this machine."""
    return holder.get("host") == socket.gethostname()


class _readable:
    """Within this context, a file that cannot be read is a DataError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise _damaged(self._path, error.strerror or str(error)) from error


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} cannot be read: {why}",
        remedy="check the file, or move the file away and run this command again",
    )
