"""An event of ``events.jsonl`` has the kinds of values that a run writes, or counts as damaged."""

from __future__ import annotations

from typing import Any

from megatron_hyperrouter.guard.heartbeat import is_number

_NUMBERS = ("total", "world_size", "seconds", "waited", "rank", "more")


def checked(event: Any) -> dict[str, Any]:
    """The event; ValueError if it is not one."""
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise ValueError("not an event")
    found: dict[str, Any] = {name: value for name, value in event.items() if value is not None}
    known = [name for name in _NUMBERS if name in found]
    if "alarm" in found and "rank" in found:  # about a late rank
        known += ["value", "since"]
    for name in ("step", "time", "attempt", *known):
        if not is_number(found.get(name)):
            raise ValueError(f"{name} is not a number")
    # the alarm about replicas has a text there
    if found["event"] != "alarm" and not isinstance(found.get("hosts", []), list):
        raise ValueError("hosts is not a list")
    if not all("=" in word for word in str(found.get("launcher_restarts", "")).split()):
        raise ValueError("launcher_restarts is not NAME=NUMBER")
    return found | {"step": int(found["step"]), "time": float(found["time"])}
