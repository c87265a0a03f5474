"""``events.jsonl``: what happened to a run, one JSON object a line, over all attempts to finish it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_hyperrouter.errors import HyperRouterError

FILE = "events.jsonl"
# A start or a continuation opens an attempt; whatever follows belongs to it.
OPENING = ("start", "resume")
# The last event of an attempt, if it can still write one.
CLOSING = ("stop", "end", "failure")
EVENTS = (*OPENING, "save", "alarm", "bad_step", *CLOSING)

Fact = str | int | float | bool | None | list[int] | list[str] | dict[str, str]
_TURN = 1.0  # seconds that another rank waits, so that rank 0 writes first


class EventsFile:
    """Appends events; written by one rank."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.attempt = _attempts(path)

    def write(self, event: str, step: int, **facts: Fact) -> None:
        """Add a line: event, time (seconds since 1970), step (completed), attempt (from 1), and facts."""
        if event not in EVENTS:
            raise ValueError(f"event {event}: must be one of {', '.join(EVENTS)}")
        if event in OPENING:
            self.attempt += 1
            if cause := cause_of_restart(read_events(self.path)):
                facts["cause"] = cause
        line = {"event": event, "time": time.time(), "step": step, "attempt": self.attempt, **_plain(facts)}
        with self.path.open("ab") as file:
            begin = b"\n" if _is_cut_off(self.path) else b""
            file.write(begin + json.dumps(line).encode() + b"\n")


def read_events(path: Path) -> list[dict[str, Fact]]:
    """All complete lines; empty if there is no file."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # a line that a kill left half-written
            continue
        if isinstance(event, dict):
            found.append(event)
    return found


def cause_of_restart(events: Sequence[Mapping[str, Fact]]) -> str:
    """How the newest attempt ended, in words; empty if there was none."""
    if not events:
        return ""
    closing = last_words(events)
    if closing is None:
        return "the previous attempt did not record its end: it was killed, or its machine failed"
    if closing["event"] == "end":
        return "the previous attempt had finished"
    if closing["event"] == "stop":
        return f"the previous attempt was stopped by {closing.get('reason', 'a request')}"
    lines = str(closing.get("message", "")).splitlines()
    return f"the previous attempt failed with {closing.get('error', 'error')}: {lines[0] if lines else ''}"


def last_words(events: Sequence[Mapping[str, Fact]]) -> Mapping[str, Fact] | None:
    """The event with which the newest attempt ended; None if it runs, or ended without one.

    Where several ranks failed, the first failure is the cause of the others.
    """
    newest = max((at for at, each in enumerate(events) if each.get("event") in OPENING), default=0)
    return next((each for each in events[newest:] if each.get("event") in CLOSING), None)


def facts_of(error: Exception) -> dict[str, Fact]:
    """The fields of ``failure`` for an error."""
    status = error.exit_status if isinstance(error, HyperRouterError) else 1
    return {"error": type(error).__name__, "message": str(error), "status": status}


def record_failure_of(rank: int, path: Path, step: int, **facts: Fact) -> None:
    """Record a failure of a rank other than rank 0, which may not know of it; do nothing if rank 0 has
    failed as well.
    """
    time.sleep(_TURN)
    if last_words(read_events(path)) is None:
        with contextlib.suppress(OSError):
            EventsFile(path).write("failure", step, rank=rank, **facts)


def _is_cut_off(path: Path) -> bool:
    """Whether a kill left the last line half-written."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _attempts(path: Path) -> int:
    return sum(event.get("event") in OPENING for event in read_events(path))


def _plain(facts: dict[str, Fact]) -> dict[str, Fact]:
    """JSON has no number for nan and inf."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in facts.items()
    }
