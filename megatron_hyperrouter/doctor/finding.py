"""What an examination finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "note", "fault"]


@dataclass(frozen=True)
class Finding:
    """The result of one check: ok, a note, or a fault."""

    check: str
    level: Level
    text: str
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", text)


def note(check: str, text: str, remedy: str = "") -> Finding:
    """Worth knowing."""
    return Finding(check, "note", text, remedy)


def fault(check: str, text: str, remedy: str) -> Finding:
    """Something to correct before a run."""
    return Finding(check, "fault", text, remedy)


def first_of(found: Sequence[Any]) -> str:
    """The first one, and how many more there are."""
    return str(found[0]) + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
