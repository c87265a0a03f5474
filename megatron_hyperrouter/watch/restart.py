"""Whether a run that has ended should be started again: a job script asks this before it requeues itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_hyperrouter.errors import STOPPED
from megatron_hyperrouter.guard.events import OPENING
from megatron_hyperrouter.watch.status import status_of
from megatron_hyperrouter.watch.trace import Event, Trace, read_trace

MOST_ATTEMPTS = 3  # in a row that begin at the same step: more would fail in the same way
_NEVER = {2: "the settings", 3: "the data", 5: "the installation"}  # exit statuses that a restart cannot mend


def worth_restarting(
    run_dir: Path, exit_status: int, *, environ: Mapping[str, str] | None = None
) -> tuple[bool, str]:
    """The answer, and why.

    ``exit_status``: that of the launcher.  A launcher may replace the exit status of a rank, so the status
    that the run has recorded has priority; a killed run has recorded none.  ``environ``: the environment of
    the job, in which Slurm counts the attempts.
    """
    if exit_status in _NEVER:
        return False, _no_use(exit_status)
    trace = read_trace(run_dir)
    status = status_of(trace, ended=True)
    if exit_status == 0 or status.state == "finished":
        return False, "the run is finished"
    unseen = _unseen(trace.opening or {}, {} if environ is None else environ)
    if unseen >= MOST_ATTEMPTS:
        return (
            False,
            f"{unseen} attempts in a row ended before they recorded a start in events.jsonl "
            f"(exit status {exit_status})",
        )
    recorded = exit_status if status.exit_status is None else status.exit_status
    if recorded in _NEVER:
        return False, _no_use(recorded)
    if recorded == STOPPED:
        return True, "the run was stopped on request and has saved a checkpoint"
    if alarm := _stopped_by(trace):
        return False, f"the alarm {alarm} stopped the run, as --alarm {alarm}=stop asks"
    begun = [each["step"] for each in trace.events if each["event"] in OPENING]
    same = next((number for number, step in enumerate(reversed(begun)) if step != begun[-1]), len(begun))
    if not begun:
        return False, f"the run ended with exit status {recorded} before its first step"
    if same >= MOST_ATTEMPTS:
        return (
            False,
            f"{same} attempts in a row started after step {begun[-1]}, and none of them saved a later "
            "checkpoint",
        )
    return True, (
        f"the run ended with exit status {recorded} "
        f"({status.reason.splitlines()[0] if status.reason else 'cause unknown'})"
    )


def _stopped_by(trace: Trace) -> str:
    """The alarm of ``--alarm NAME=stop`` that has ended the newest attempt; empty if none has."""
    for each in reversed(trace.events):
        if each["event"] in OPENING:
            break
        # a rank whose weights differ gives an alarm as well: a restart may avoid its machine
        if each["event"] == "alarm" and each.get("action") == "stop" and each.get("alarm") != "replicas":
            return str(each.get("alarm"))
    return ""


def _unseen(opening: Event, environ: Mapping[str, str]) -> int:
    """Attempts of this Slurm job since the newest one that has recorded its start."""
    job = f"SLURM_JOB_ID={environ.get('SLURM_JOB_ID')}"
    count = int(environ.get("SLURM_RESTART_COUNT") or 0)
    if job not in str(opening.get("job", "")).split():
        return count + 1 if "SLURM_JOB_ID" in environ else 0
    seen = dict(word.split("=", 1) for word in str(opening.get("launcher_restarts", "")).split())
    return count - int(seen.get("SLURM_RESTART_COUNT", 0))


def _no_use(exit_status: int) -> str:
    return f"exit status {exit_status}: a restart does not solve a problem with {_NEVER[exit_status]}"
