"""Heartbeats: a small file of each rank that says what the rank does, replaced every few seconds."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeGuard, TypeVar

Item = TypeVar("Item")

FOLDER = "heartbeat"
SECONDS = 10.0  # between two beats
_MOST = 1e15  # a larger number is damage, and may not fit into a float
MOST_FILES = 64  # with more ranks, one file of each node


class Indexed(Protocol):
    """A dataset."""

    def __len__(self) -> int:
        """How many items there are."""
        ...

    def __getitem__(self, i: int, /) -> Any:
        """One of them."""
        ...


@dataclass(frozen=True)
class Beat:
    """What a rank was doing when it wrote this."""

    rank: int
    host: str
    pid: int
    step: int  # completed
    phase: str  # "data", "step", "evaluate", "save", ...
    since: float  # when the phase began, seconds since 1970
    time: float  # when this was written
    where: str  # the innermost function of the main thread
    waits: bool  # the main thread is inside a collective
    every: float = SECONDS  # seconds until the next beat


@dataclass
class Progress:
    """The present step and phase of this rank; the training loop sets it, other threads read it."""

    step: int = 0
    phase: str = "start"
    since: float = field(default_factory=time.time)
    moved: float = field(default_factory=time.monotonic)  # the same, by a clock that nobody sets

    def enter(self, phase: str, step: int) -> None:
        """Begin a phase, or record progress in it."""
        self.step, self.phase, self.since, self.moved = step, phase, time.time(), time.monotonic()

    def through(self, items: Iterable[Item], getting: str, working: str, step: int) -> Iterator[Item]:
        """Yields the same items; the phase is ``getting`` while one is fetched, and ``working``
        afterwards.
        """
        self.enter(getting, step)
        for item in items:
            self.enter(working, step)
            yield item
            self.enter(getting, step)
        self.enter(working, step)

    def of_reading(self, dataset: Indexed) -> Indexed:
        """The same dataset; each read counts as progress of the run."""
        return _Read(dataset, self)


class _Read:
    def __init__(self, dataset: Indexed, progress: Progress) -> None:
        self._dataset, self._progress = dataset, progress

    def __len__(self) -> int:
        """As the dataset."""
        return len(self._dataset)

    def __getitem__(self, i: int) -> Any:
        """As the dataset."""
        self._progress.enter(self._progress.phase, self._progress.step)
        return self._dataset[i]


def beat_of(progress: Progress, rank: int, where: str, waits: bool, every: float = SECONDS) -> Beat:
    """The beat of this process at this moment."""
    host, pid = socket.gethostname(), os.getpid()
    now = progress.step, progress.phase, progress.since
    return Beat(rank, host, pid, *now, time.time(), where, waits, every)


def file_of(folder: Path, rank: int) -> Path:
    """The file of a rank."""
    return folder / f"rank-{rank:05d}.json"


def writes_file(rank: int, world_size: int, local_rank: int) -> bool:
    """Whether this rank has a file: all where they are few, else the first of each node."""
    return world_size <= MOST_FILES or local_rank == 0


def write_beat(folder: Path, beat: Beat) -> None:
    """Replace the rank's file; a reader sees the old or the new one."""
    path = file_of(folder, beat.rank)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(asdict(beat)) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def read_beats(folder: Path, world_size: int | None = None) -> dict[int, Beat]:
    """The newest beat of each rank that has one; ``world_size``: leaves out ranks that only an earlier
    attempt had.
    """
    found: dict[int, Beat] = {}
    paths: list[Path] = []
    with contextlib.suppress(OSError):  # a file server may be unreachable for a while
        paths = sorted(folder.glob("rank-*.json"))
    for path in paths:
        with contextlib.suppress(OSError, ValueError, TypeError):
            beat = Beat(**json.loads(path.read_text(encoding="utf-8")))
            if _is_sound(beat) and (world_size is None or beat.rank < world_size):
                found[beat.rank] = beat
    return found


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value in a file about a run is a number that the program may have written."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST


def _is_sound(beat: Beat) -> bool:
    sound = all(map(is_number, (beat.rank, beat.step, beat.since, beat.time, beat.every)))
    return sound and isinstance(beat.rank, int) and isinstance(beat.phase, str)
