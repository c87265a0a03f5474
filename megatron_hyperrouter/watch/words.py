"""The text of a status."""

from __future__ import annotations

import time

from megatron_hyperrouter.watch.status import Status


def lines_of(status: Status) -> list[tuple[str, str]]:
    """Label and text of each line."""
    rows = [("run", status.run), ("state", _state(status)), ("step", _step(status))]
    if status.speed is not None and status.step_time is not None:
        rows.append(("speed", f"{status.speed:,.0f} tokens/s, {status.step_time:.3g} s per step"))
    if status.eta is not None:
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + status.eta))
        rows.append(("ETA", f"{duration(status.eta)} (at {at})"))
    rows.append(("last save", _save(status)))
    rows += [("late" if number == 0 else "", rank) for number, rank in enumerate(status.late)]
    rows.append(("restarts", str(status.restarts)))
    rows += [("", f"{number}. {cause}") for number, cause in enumerate(status.causes[-3:], _first(status))]
    if status.goodput is not None and status.wall is not None:
        repeated = (
            f"; {duration(status.repeated)} spent on repeating steps after restarts"
            if status.repeated >= 1
            else ""
        )
        spent = f"{duration(status.trained)} of {duration(status.wall)} spent in training steps{repeated}"
        rows.append(("goodput", f"{status.goodput:.1%} ({spent})"))
    if status.hosts:
        more = f" and {len(status.hosts) - 4} more" if len(status.hosts) > 4 else ""
        rows.append(("hosts", ", ".join(status.hosts[:4]) + more))
    return rows + [("note", note) for note in status.notes]


def duration(seconds: float) -> str:
    """``3:07:05``, with days where there are any."""
    whole = round(seconds)
    days, clock = whole // 86400, f"{whole // 3600 % 24}:{whole // 60 % 60:02}:{whole % 60:02}"
    return f"{days} d {clock}" if days else clock


def _state(status: Status) -> str:
    ended = "" if status.exit_status is None else f" (exit status {status.exit_status})"
    return f"{status.state}{ended}" + (f": {status.reason}" if status.reason else "")


def _step(status: Status) -> str:
    if not status.total:
        return f"{status.step:,}"
    return f"{status.step:,} of {status.total:,} ({status.step / status.total:.1%})"


def _save(status: Status) -> str:
    save = status.last_save
    if save is None:
        return "none yet"
    taken = f", took {save['seconds']:.1f} s" if "seconds" in save else ""
    return f"step {save['step']:,}, {duration(save['age'])} ago{taken}"


def _first(status: Status) -> int:
    return max(1, len(status.causes) - 2)
