"""The state of a run, derived from its files: running, stopped, finished, failed or hung."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from megatron_hyperrouter.guard.events import OPENING
from megatron_hyperrouter.guard.health.late_ranks import REPORT_HOLDS, RULES, sentence
from megatron_hyperrouter.guard.run_lock import STALE
from megatron_hyperrouter.guard.watchdog import apart, describe
from megatron_hyperrouter.watch.trace import Event, Trace, is_here

STATES = {"end": "finished", "stop": "stopped", "failure": "failed"}
_MISSED = 3  # heartbeats that a rank may miss
_STILL = 60.0  # seconds without progress that are normal
_STEPS = 10  # ... or this many usual steps
_FIRST_STEP = 1800.0  # seconds: kernels are compiled and caches filled in it


@dataclass(frozen=True)
class Status:
    """The state of a run for the user."""

    run: str
    state: str  # running, stopped, finished, failed, hung
    reason: str  # why, in words; empty if the state says it all
    exit_status: (
        int | None
    )  # of an attempt that has ended; None if it is running, or ended without recording it
    step: int  # completed
    total: int | None
    speed: float | None  # tokens a second
    step_time: float | None  # seconds
    eta: float | None  # seconds until the last step
    last_save: dict[str, Any] | None  # step, age (seconds), folder, seconds (taken), waited
    late: list[str]  # ranks that delay the others
    restarts: int
    causes: list[str]  # of the restarts
    goodput: float | None  # seconds in steps that count / seconds since the first start
    trained: float  # seconds in steps that count
    repeated: float  # seconds in steps that were taken again after a restart
    wall: float | None  # seconds from the first start until now, or until the last event
    hosts: list[str]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def status_of(trace: Trace, *, ended: bool = False) -> Status:
    """The state that the files show; ``ended``: the launcher has ended, so no process is alive any more."""
    opening = trace.opening or {}
    late = _late(trace, opening)
    state, reason, exit_status = _state(trace, late, alive=not ended and _is_alive(trace))
    alive = state in ("running", "hung")
    step = max(trace.steps.last, int(opening.get("step", 0)))
    total = _whole(opening.get("total"))
    step_time = statistics.fmean(trace.steps.step_times) if trace.steps.step_times else None
    begun = trace.events[0]["time"] if trace.events else None
    wall = None if begun is None else max(0.0, _until(trace, alive=alive) - begun)
    return Status(
        run=str(trace.run_dir),
        state=state,
        reason=reason,
        exit_status=exit_status,
        step=step,
        total=total,
        speed=trace.steps.speed,
        step_time=step_time,
        eta=_eta(trace, step, total, step_time) if state == "running" else None,
        last_save=_last_save(trace),
        late=(late or _late_in_steps(trace, step)) if alive else [],
        restarts=max(0, sum(each["event"] in OPENING for each in trace.events) - 1),
        causes=[str(each["cause"]) for each in trace.events if each.get("cause")],
        goodput=trace.steps.trained / wall if wall else None,
        trained=trace.steps.trained,
        repeated=trace.repeated,
        wall=wall,
        hosts=[str(host) for host in opening.get("hosts", [])],
        notes=list(trace.notes),
    )


def _state(trace: Trace, late: list[str], *, alive: bool) -> tuple[str, str, int | None]:
    """State, reason, exit status."""
    closing = trace.closing
    newest = trace.events[-1]["time"] if trace.events else 0.0
    begins_again = alive and (trace.held_since or 0.0) > newest
    if not trace.events or (closing is not None and begins_again):
        if alive:
            return "running", "the run is starting and has not recorded its start in events.jsonl yet", None
        return (
            "failed",
            "the run ended before it recorded a start in events.jsonl; the log of the job shows why",
            None,
        )
    if closing is not None:
        status = closing.get("status")
        return STATES[closing["event"]], _why(closing), int(status) if isinstance(status, int) else None
    if not alive:
        return "failed", "the run did not record its end: it was killed, or its machine failed", None
    return ("hung", "; ".join(late), None) if late else ("running", "", None)


def _why(closing: Event) -> str:
    if closing["event"] == "stop":
        return f"by {closing.get('reason', 'a request')}"
    if closing["event"] == "failure":
        rank = f"rank {closing['rank']}: " if "rank" in closing else ""
        return f"{rank}{closing.get('error', 'error')}: {closing.get('message', '')}"
    return ""


def _is_alive(trace: Trace) -> bool:
    if trace.held is not None and (trace.held or is_here(trace.holder) or not trace.holder):
        return trace.held
    # Locks of another machine may not be seen here, or there are none: a run that writes is alive.
    renewed = trace.held is None and trace.held_since is not None and trace.now - trace.held_since < STALE
    return renewed or any(
        seconds <= _MISSED * trace.beats[rank].every for rank, seconds in trace.silent.items()
    )


def _late(trace: Trace, opening: Event) -> list[str]:
    """The ranks that are silent, or that delay the others while there is no progress."""
    beats, silent = trace.beats, trace.silent
    lost = [rank for rank, seconds in silent.items() if seconds > _MISSED * beats[rank].every]
    if lost:
        return [f"{describe(beats[rank])}; silent for {silent[rank]:.0f} s" for rank in lost]
    if not beats:
        return []
    # The newest move of any rank: how long ago it was when the beat was written, and that beat's age.
    still = min(beat.time - beat.since + silent[rank] for rank, beat in beats.items())
    usual = statistics.median(trace.steps.step_times) if trace.steps.step_times else 0.0
    first = max(beat.step for beat in beats.values()) <= int(opening.get("step", 0))
    if still <= (_FIRST_STEP if first else max(_STILL, _STEPS * usual)):
        return []
    names = apart(beats) or sorted(beats)[:1]
    return [f"{describe(beats[rank])}; no progress for {still:.0f} s" for rank in names]


def _late_in_steps(trace: Trace, step: int) -> list[str]:
    """The rank in the newest alarm of each kind about a late rank, of this attempt; a rank that was not
    named again is late no more.
    """
    found: dict[str, str] = {}
    for each in reversed(trace.events):
        if each["event"] in OPENING or step - each["step"] > REPORT_HOLDS:
            break
        rule = next((rule for rule in RULES if rule.alarm == each.get("alarm")), None)
        if rule is not None and rule.alarm not in found and "rank" in each:
            beat = trace.beats.get(each["rank"])
            found[rule.alarm] = sentence(rule, each.get("host") or (beat.host if beat else ""), each)
    return list(found.values())


def _until(trace: Trace, *, alive: bool) -> float:
    """Now for a run that runs; else its last sign of life."""
    if alive:
        return trace.now
    signs: list[float] = [each["time"] for each in trace.events]
    if trace.closing is None:
        signs += [beat.time for beat in trace.beats.values()]
        signs += [trace.last_step] if trace.last_step is not None else []
    return max(signs)


def _eta(trace: Trace, step: int, total: int | None, step_time: float | None) -> float | None:
    """At the current speed, including the time that the attempt has spent outside of steps."""
    if total is None or step_time is None:
        return None
    opening = trace.opening or {}
    spent = trace.now - float(opening.get("time", trace.now))
    beside = max(1.0, spent / trace.steps.since) if trace.steps.since > 0 else 1.0
    return max(0, total - step) * step_time * beside


def _last_save(trace: Trace) -> dict[str, Any] | None:
    save = next((each for each in reversed(trace.events) if each["event"] == "save"), None)
    if save is None:
        return None
    known = {name: save[name] for name in ("step", "folder", "seconds", "waited") if name in save}
    return known | {"age": max(0.0, trace.now - save["time"])}


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None
