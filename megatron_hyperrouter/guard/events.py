"""``events.jsonl``: what happened to a run, one JSON object a line, over all attempts to finish it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

# A start or a continuation opens an attempt; whatever follows belongs to it.
OPENING = ("start", "resume")
EVENTS = (*OPENING, "save", "alarm", "bad_step", "stop", "end", "failure")

Fact = str | int | float | bool | None | list[int]


class EventsFile:
    """Appends events; written by one rank."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.attempt = _attempts(path)

    def write(self, event: str, step: int, **facts: Fact) -> None:
        """Add a line: event, time (seconds since 1970), step (completed), attempt (from 1), and facts."""
        if event not in EVENTS:
            raise ValueError(f"event {event!r}: must be one of {', '.join(EVENTS)}")
        if event in OPENING:
            self.attempt += 1
        line = {"event": event, "time": time.time(), "step": step, "attempt": self.attempt, **_plain(facts)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_events(path: Path) -> list[dict[str, Fact]]:
    """All whole lines; empty where there is no file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
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


def _attempts(path: Path) -> int:
    return sum(event.get("event") in OPENING for event in read_events(path))


def _plain(facts: dict[str, Fact]) -> dict[str, Fact]:
    """JSON has no number for nan and inf."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in facts.items()
    }
