"""Starts the runs of a study, several at a time.  Each finishes its stages one after another and continues
after an interruption; runs with other settings are never mixed in.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from megatron_hyperrouter.config.by_role import names_with
from megatron_hyperrouter.config.leaves import flag
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.files import check_folder, write_json
from megatron_hyperrouter.paths import unexpanded
from megatron_hyperrouter.processes import child_environment, cores
from megatron_hyperrouter.terminal import Bar, Stopped, note

if TYPE_CHECKING:
    from megatron_hyperrouter.config.reading.sources import CommandLine, YamlFile
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.flags import Parser

PROGRAM = ("-m", "megatron_hyperrouter", "train")
OURS = ("--config", "--run-dir", *map(flag, names_with(Role.START)))  # flags of the program that a study sets
LAYOUT = names_with(Role.LAYOUT)
SECONDS_TO_SAVE = 60.0
STOPPED = 6  # exit status of a run that was asked to stop
_TAIL_BYTES = 1 << 16  # of a metrics file: more than its last line


@dataclass(frozen=True)
class RunProcess:
    """A process of a run; ``command``: what follows ``python`` on the command line."""

    what: str  # for messages: "training"
    command: Sequence[str]


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    folder: Path
    config: RunConfig
    # goes to task.json; "settings" is the digest of all that the results depend on
    task: Mapping[str, Any]

    resumes: ClassVar[bool] = True  # from its last checkpoint

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do; a subclass can define this."""
        return (self.folder / "results.json").exists()

    def stages(self) -> list[RunProcess]:
        """What is left to do, asked when the run starts: its settings are in ``settings.yaml``, its task
        in ``task.json``.
        """
        raise NotImplementedError


def digest_of(config: RunConfig, scored: Mapping[str, Any]) -> str:
    """The key under which results are stored: a digest of the settings (without the run's folder) and the
    scoring.
    """
    from megatron_hyperrouter.config.cli import dump

    return hashlib.sha256((dump(config) + json.dumps(scored)).encode()).hexdigest()


def read_record(path: Path, *names: str) -> dict[str, Any]:
    """A JSON file of a study, which has the fields ``names``; DataError for a damaged one."""
    from megatron_hyperrouter.errors import DataError, reason_of

    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {name: found[name] for name in names} | found
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read: {reason_of(error)}",
            remedy="restore the file from a copy, or remove it; then run the same command again",
        ) from error


@contextlib.contextmanager
def filling(output: Path) -> Iterator[None]:
    """The folder of a study, for the work in the block; ConfigError if it cannot be written, and
    HyperRouterError if the disk becomes full.
    """
    from megatron_hyperrouter.errors import HyperRouterError

    check_folder(output)
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise HyperRouterError(
            f"{output} cannot be written: {error.strerror}",
            remedy="free up space on that disk, then run the same command again",
        ) from error


def check_finished(plans: Sequence[StudyRun]) -> None:
    """A table must not mix settings; raises ConfigError that names the runs that were made with others."""
    from megatron_hyperrouter.errors import ConfigError, Problem

    problems = []
    for plan in plans:
        started = plan.folder / "task.json"
        if started.exists() and read_record(started, "settings")["settings"] != plan.task["settings"]:
            problems.append(
                Problem(
                    "--output",
                    plan.folder,
                    "contains a run that was started with different settings",
                    "give another --output, or remove this folder",
                )
            )
    if problems:
        raise ConfigError(problems)


def refuse_flags(flags: Parser, line: CommandLine, more: Sequence[str] = ()) -> None:
    """Refuse flags of the program that this command sets itself; raises ConfigError."""
    for name in (name for name in line.flags if name in (*OURS, *more)):
        flags.refuse(name, "", "is set by this command", f"leave out {name}")


def file_values(file: YamlFile, *, without: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of ``--config``, except those that the study sets and those named."""
    dropped = {*without, *(word.removeprefix("--").replace("-", "_") for word in OURS)}
    return {key: value for key, value in file.values.items() if key not in dropped}


def write_plan(plan: StudyRun) -> Path:
    """Put settings and task into the folder of a run; returns the settings' file."""
    from megatron_hyperrouter.config.cli import dump

    plan.folder.mkdir(parents=True, exist_ok=True)
    settings = plan.folder / "settings.yaml"
    settings.write_text(dump(plan.config), encoding="utf-8")
    write_json(plan.folder / "task.json", plan.task)
    return settings


def is_trained(plan: StudyRun) -> bool:
    """Whether its newest checkpoint is that of the last step."""
    from megatron_hyperrouter.checkpoint.folder import find, read_manifest

    newest = find(plan.folder)
    return newest is not None and read_manifest(newest)["step"] >= plan.config.train.train_iters


def training(plan: StudyRun, ranks: int = 1) -> RunProcess:
    """Train, from the last checkpoint if there is one."""
    load = unexpanded(plan.folder) if plan.resumes else "none"
    return RunProcess(
        "training",
        on_ranks([*PROGRAM, "--config", unexpanded(plan.folder / "settings.yaml"), "--load", load], ranks),
    )


def on_ranks(command: Sequence[str], ranks: int) -> list[str]:
    """``command`` on ``ranks`` ranks of this machine; torchrun gives them less time to save than a study
    gives torchrun.
    """
    if ranks == 1:
        return list(command)
    patience = ["--shutdown-timeout", str(int(0.8 * SECONDS_TO_SAVE))]
    return [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(ranks),
        *patience,
        *command,
    ]


# --------------------------------------------------------------------------------------------- runs
@dataclass
class _Started:
    """A run in progress."""

    plan: StudyRun
    log: TextIO
    left: list[RunProcess]
    slot: int  # of the simultaneous runs
    process: subprocess.Popen[bytes] | None = None
    what: str = ""


def run_all(plans: Sequence[StudyRun], jobs: int, *, ranks: int = 1) -> None:
    """Finish all plans, ``jobs`` at a time, of at most ``ranks`` each; the first failure ends them all,
    and is the error.
    """
    waiting, running, ended = list(plans), list[_Started](), 0
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(cores() // (jobs * ranks), 1))
    env = child_environment(OMP_NUM_THREADS=threads, PYTHONWARNINGS="ignore")
    steps = sum(plan.config.train.train_iters for plan in plans)
    slots = [gpus_of_slot(slot, ranks) if jobs > 1 else {} for slot in range(jobs)]
    try:
        with Bar("training", "steps") as bar:
            bar.begin_at(sum(trained_steps(plan) for plan in plans))
            while waiting or running:
                while waiting and len(running) < jobs:
                    free = min(set(range(jobs)) - {run.slot for run in running})
                    running.append(_start(waiting.pop(0), free))
                    name = running[-1].plan.folder.name
                    note(f"{name}: started; {ended} of {len(plans)} runs are finished")
                for run in list(running):
                    if run.process is not None and run.process.poll() is None:
                        continue
                    _check_status(run)
                    if run.left:
                        _next_stage(run, env | slots[run.slot])
                    else:
                        run.log.close()
                        running.remove(run)
                        ended += 1
                if bar.is_due():
                    done = sum(trained_steps(plan) for plan in plans)
                    bar.update(done, steps, f"{ended} of {len(plans)} runs finished")
                time.sleep(0.1)
    except Stopped as reason:
        reason.left = "run the same command again to continue"
        raise
    finally:
        _stop(running)


def gpus_of_slot(slot: int, ranks: int) -> dict[str, str]:
    """The environment that gives the run in this slot its own GPUs.  A study has a slot for each of its
    simultaneous runs; each run has ``ranks`` ranks.

    Without it, all runs would use the first GPUs of the machine.  It is empty if the GPUs are enough for only
    one run.  If there are more slots than GPUs, the runs share the GPUs evenly.
    """
    places = len(names := _gpus()) // ranks
    if places < 2:
        return {}
    first = slot % places * ranks
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[first : first + ranks])}


def _gpus() -> list[str]:
    """The names of the visible GPUs, by the rules of CUDA_VISIBLE_DEVICES."""
    import torch

    count, listed = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(number) for number in range(count)]
    return [name.strip() for name in listed.split(",")][:count]


def trained_steps(plan: StudyRun) -> int:
    """Optimizer steps that the run's metrics show so far."""
    try:
        with (plan.folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            steps = re.findall(rb'"step": (\d+)', file.read())
    except OSError:
        return 0
    return min(int(steps[-1]), plan.config.train.train_iters) if steps else 0


def _start(plan: StudyRun, slot: int) -> _Started:
    write_plan(plan)
    return _Started(plan, (plan.folder / "log.txt").open("a", encoding="utf-8"), plan.stages(), slot)


def _next_stage(run: _Started, env: Mapping[str, str]) -> None:
    """A Python process in a separate process group: Ctrl-C reaches only this tool, which then lets the
    runs save.
    """
    stage = run.left.pop(0)
    run.what = stage.what
    command = [sys.executable, *stage.command]
    run.process = subprocess.Popen(
        command, env=env, stdout=run.log, stderr=subprocess.STDOUT, start_new_session=True
    )


def _check_status(run: _Started) -> None:
    """HyperRouterError, with the end of its log, for a run that failed, or whose training was stopped from
    outside.
    """
    from megatron_hyperrouter.errors import HyperRouterError

    if run.process is None:
        return
    status = run.process.returncode
    stopped = status == STOPPED or (not status and run.what == "training" and not is_trained(run.plan))
    if status or stopped:
        run.log.flush()
        tail = Path(run.log.name).read_text(encoding="utf-8", errors="replace")[-3000:]
        how = "was stopped before its last step" if stopped else f"ended with exit status {status}"
        raise HyperRouterError(
            f"{run.plan.folder}: {run.what} {how}\n--- end of the log of this run\n{tail.rstrip()}\n---",
            remedy="run the same command again to continue"
            if stopped
            else "correct what this log reports, then run the same command again",
        )


def _stop(running: Sequence[_Started]) -> None:
    """Let runs save a checkpoint and end."""
    started = [(run, run.process) for run in running if run.process is not None]
    for _, process in started:
        if process.poll() is None:
            process.terminate()
    end = time.monotonic() + SECONDS_TO_SAVE
    for _, process in started:
        try:
            process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for run in running:
        run.log.close()
