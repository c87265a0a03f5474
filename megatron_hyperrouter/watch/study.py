"""The state of a study: the folder of ``mhr compare`` or ``mhr scaling``, with a run folder for each run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hyperrouter.errors import HyperRouterError
from megatron_hyperrouter.guard.events import FILE
from megatron_hyperrouter.terminal import counted
from megatron_hyperrouter.watch.status import Status, status_of
from megatron_hyperrouter.watch.trace import read_trace
from megatron_hyperrouter.watch.words import duration

WAITING, UNREADABLE = "not started", "unreadable"
_TASK = "task.json"  # a study writes it into the folder of a run just before the run starts


@dataclass(frozen=True)
class RunOfStudy:
    """One run; ``status`` is None if it has not started, or if its files cannot be read."""

    folder: Path
    status: Status | None
    has_results: bool  # trained and scored: nothing is left to do
    error: str = ""

    @property
    def state(self) -> str:
        """The state of the run, or why it has none."""
        if self.status is None:
            return UNREADABLE if self.error else WAITING
        return self.status.state

    def as_json(self) -> dict[str, Any]:
        """The fields of a status; of a run without one, its folder and state."""
        known = self.status.as_json() if self.status else {"run": str(self.folder), "reason": self.error}
        return {**known, "state": self.state, "has_results": self.has_results}


@dataclass(frozen=True)
class Study:
    """A study and its runs, in the order of their names."""

    folder: Path
    command: str  # that writes the study
    runs: Sequence[RunOfStudy]

    def as_json(self) -> dict[str, Any]:
        """The study, and each run as ``mhr status RUN --json`` shows it."""
        return {
            "study": str(self.folder),
            "command": self.command,
            "runs": [run.as_json() for run in self.runs],
        }


def read_study(folder: Path) -> Study | None:
    """The study in ``folder``; None if it is not the folder of a study."""
    if (folder / FILE).exists():
        return None  # a run
    found = sorted((path.parent for path in folder.glob(f"runs/*/{_TASK}")), key=_in_order)
    if not found:
        return None
    command = "mhr compare" if (folder / "study.json").exists() else "mhr scaling"
    return Study(folder, command, [_read_run(path) for path in found])


def lines_of_study(study: Study) -> list[str]:
    """One line that says what the folder is, one with the number of runs in each state, and one a run."""
    counts = Counter(run.state for run in study.runs)
    done = sum(run.has_results for run in study.runs)
    states = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    width = max(len(run.folder.name) for run in study.runs)
    wide = max(len(run.state) for run in study.runs)
    return [
        f"{study.folder}: study of {study.command}",
        f"{counted(len(study.runs), 'run')} so far: {states}; {done} with results",
        *(
            f"{run.folder.name:<{width}}  {run.state:<{wide}}  {_progress(run)}".rstrip()
            for run in study.runs
        ),
    ]


def _read_run(folder: Path) -> RunOfStudy:
    has_results = (folder / "results.json").exists()
    if not (folder / FILE).exists():
        return RunOfStudy(folder, None, has_results)
    try:
        return RunOfStudy(folder, status_of(read_trace(folder)), has_results)
    except HyperRouterError as error:
        return RunOfStudy(folder, None, has_results, error.message)


def _in_order(path: Path) -> list[tuple[int, str]]:
    """``hyper-seed2`` before ``hyper-seed10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _progress(run: RunOfStudy) -> str:
    status = run.status
    if status is None:
        return run.error
    parts = [f"step {status.step:,}" + (f" of {status.total:,}" if status.total else "")]
    if status.speed is not None and status.state == "running":
        parts.append(f"{status.speed:,.0f} tokens/s")
    if status.eta is not None:
        parts.append(f"{duration(status.eta)} left")
    if status.state == "finished" and not run.has_results:
        parts.append("no results yet")
    return ", ".join(parts) + (f": {status.reason}" if status.reason else "")
