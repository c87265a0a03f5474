"""Whether a run that has ended should be started again: what a job script asks before it requeues itself."""

from __future__ import annotations

from pathlib import Path

from megatron_hyperrouter.errors import STOPPED
from megatron_hyperrouter.guard.events import OPENING
from megatron_hyperrouter.watch.status import status_of
from megatron_hyperrouter.watch.trace import read_trace

MOST_ATTEMPTS = 3  # in a row that begin at the same step: more would fail in the same way
_NEVER = {2: "settings", 3: "data", 5: "the installation"}  # exit statuses that a restart cannot mend


def worth_restarting(run_dir: Path, exit_status: int, *, attempts: int = MOST_ATTEMPTS) -> tuple[bool, str]:
    """The answer, and why.

    ``exit_status``: what the launcher ended with.  A launcher may turn the status of a rank into its own, so
    what the run has recorded counts first; a killed run has recorded nothing.
    """
    if exit_status in _NEVER:
        return False, _no_use(exit_status)
    trace = read_trace(run_dir)
    status = status_of(trace, ended=True)
    if exit_status == 0 or status.state == "finished":
        return False, "it has finished"
    recorded = exit_status if status.exit_status is None else status.exit_status
    if recorded in _NEVER:
        return False, _no_use(recorded)
    if recorded == STOPPED:
        return True, "it was stopped on request, after a checkpoint"
    begun = [each["step"] for each in trace.events if each["event"] in OPENING]
    same = next((number for number, step in enumerate(reversed(begun)) if step != begun[-1]), len(begun))
    if not begun:
        return False, f"exit status {recorded} before the first step"
    if same >= attempts:
        return False, f"{same} attempts in a row began after step {begun[-1]}, and none saved a later one"
    return True, f"exit status {recorded} ({status.reason.splitlines()[0] if status.reason else 'unknown'})"


def _no_use(exit_status: int) -> str:
    return f"exit status {exit_status}: a restart does not mend {_NEVER[exit_status]}"
