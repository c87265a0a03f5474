"""``mhr status`` on real runs: it reads the state from files alone, during a run and after its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from program.launched import Job, Zygote, metrics
from program.settings import STEPS, flags_of
from program.slow_rank import HEALTHY

from megatron_hyperrouter.data.store.token_files import IndexedWriter
from megatron_hyperrouter.watch.status import Status, status_of
from megatron_hyperrouter.watch.trace import Event, read_trace

pytestmark = pytest.mark.processes
ONE_RANK = ["--moe-router-topk", "2", "--eval-interval", "0"]
NO_PAUSE = ["--eval-interval", "0", "--save-interval", "0"]
PACE = 0.3  # seconds more for each step


def now(run_dir: Path) -> Status:
    return status_of(read_trace(run_dir))


def has_taken(run_dir: Path, steps: int) -> bool:
    path = run_dir / "metrics.jsonl"
    return path.exists() and len(path.read_bytes().splitlines()) >= steps


def until(job: Job, happened: Callable[[], bool]) -> None:
    assert job.wait_for(happened, 120), job.stderr


def test_the_life_of_a_run(zygote: Zygote, text: Path, tmp_path: Path) -> None:
    """Running, stopped, running, killed, finished."""
    run_dir = tmp_path / "run"
    flags = flags_of(text, run_dir, "--load", run_dir, layout=ONE_RANK)
    job = zygote.start(flags, pace=PACE)
    until(job, partial(has_taken, run_dir, 4))
    running = now(run_dir)
    assert (running.state, running.total, running.restarts, running.exit_status) == (
        "running",
        STEPS,
        0,
        None,
    )
    assert 4 <= running.step < STEPS and running.late == [] and len(running.hosts) == 1
    assert running.eta is not None and running.eta >= (STEPS - running.step - 1) * PACE
    job.kill(signal.SIGTERM)
    job.wait()
    stopped = now(run_dir)
    assert (stopped.state, stopped.exit_status, stopped.reason) == ("stopped", 6, "by SIGTERM")
    assert stopped.step == metrics(run_dir)[-1]["step"] and stopped.eta is None
    assert stopped.last_save is not None and stopped.last_save["step"] == stopped.step

    job = zygote.start(flags, pace=PACE)
    until(job, partial(has_taken, run_dir, stopped.step + 2))
    assert now(run_dir).state == "running"
    job.kill()
    job.wait()
    killed = now(run_dir)
    assert (killed.state, killed.exit_status) == ("failed", None) and "killed" in killed.reason

    zygote.run(flags)
    finished = now(run_dir)
    assert (finished.state, finished.exit_status, finished.step) == ("finished", 0, STEPS)
    assert finished.restarts == 2 and [cause.split()[3] for cause in finished.causes] == ["was", "did"]
    # an oracle of its own: the sums over the lines of the file, and the times of the first and last event
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    trained = sum(line["step_time"] for line in metrics(run_dir, times=True))
    assert finished.goodput == pytest.approx(trained / (events[-1]["time"] - events[0]["time"]))
    assert finished.repeated > 0 and 0 < finished.goodput < 1
    saves = [each for each in events if each["event"] == "save"]
    assert saves and all(each["seconds"] >= each["waited"] >= 0 for each in saves)
    assert events[0]["versions"]["torch"] and events[0]["world_size"] == 1 and events[-1]["status"] == 0


def test_a_rank_that_was_stopped_is_named_and_the_hang_is_the_cause_of_the_failure(
    zygote: Zygote, text: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    limit = 0.4  # minutes
    more = ["--train-iters", "500", "--save-interval", "0", "--distributed-timeout-minutes", str(limit)]
    job = zygote.start(flags_of(text, run_dir, *more), ranks=2, pace=0.1)
    until(job, partial(has_taken, run_dir, 3))
    os.kill(job.pids[1], signal.SIGSTOP)
    begun = time.monotonic()
    until(job, lambda: now(run_dir).state == "hung")
    assert time.monotonic() - begun < 2 * 60 * limit
    hung = now(run_dir)
    assert hung.late and "rank 1 (" in hung.late[0] and f"pid {job.pids[1]}" in hung.late[0]
    until(job, lambda: job.poll()[0] is not None)
    os.kill(job.pids[1], signal.SIGKILL)
    job.wait()
    failed = now(run_dir)
    assert (failed.state, failed.exit_status) == ("failed", 1)
    assert "Hang" in failed.reason and f"pid {job.pids[1]}" in failed.reason


def test_the_failure_of_one_rank_is_recorded_by_that_rank(zygote: Zygote, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "numbers", np.uint16) as writer:
        for number in range(40):
            tokens = np.arange(50, dtype=np.uint16)
            tokens[25] = 300 if number == 17 else 25
            writer.add_document(tokens)
    flags = flags_of(tmp_path / "numbers", tmp_path / "run", "--train-iters", 15, "--split", "1,0,0")
    job = zygote.start(flags, ranks=2).wait()
    assert job.status == 3, job.stderr
    failed = now(tmp_path / "run")
    assert (failed.state, failed.exit_status) == ("failed", 3)
    assert "DataError" in failed.reason and "document 17: token id 300" in failed.reason


def test_a_rank_whose_data_are_late_is_named(zygote: Zygote, text: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    flags = flags_of(text, run_dir, "--train-iters", 24, *NO_PAUSE)
    job = zygote.run(flags, ranks=2, program=Path(__file__).with_name("late_data.py"))
    (alarm,) = [each for each in read_trace(run_dir).events if each.get("alarm") == "late_data"]
    assert (alarm["rank"], alarm["step"], alarm["since"]) == (1, 21, 2) and 0.1 < alarm["value"] < 1
    assert alarm["host"] == socket.gethostname()
    assert f"rank 1 ({alarm['host']}): all ranks waited for the data of this rank" in job.stderr


STAGES = "--pipeline-model-parallel-size 2 --micro-batch-size 4"


@pytest.mark.parametrize(
    "layout", ["--engine deepspeed --expert-model-parallel-size 2", f"--engine megatron {STAGES}"]
)
def test_a_rank_that_becomes_slow_is_named_while_the_run_continues(
    zygote: Zygote, text: Path, tmp_path: Path, layout: str
) -> None:
    """Nobody is named as long as both ranks are healthy."""
    run_dir = tmp_path / "run"
    flags = flags_of(
        text, run_dir, "--train-iters", 500, *NO_PAUSE, layout=[*layout.split(), "--moe-router-topk", "2"]
    )
    job = zygote.start(flags, ranks=2, program=Path(__file__).with_name("slow_rank.py"))

    def alarms() -> list[Event]:
        return [each for each in read_trace(run_dir).events if each.get("alarm") == "slow_rank"]

    # the line on the console comes after the event
    until(job, lambda: "mhr doctor" in job.stderr and (run_dir / "events.jsonl").exists() and alarms())
    late = now(run_dir).late
    job.kill()
    job.wait()
    (alarm,) = alarms()
    # A healthy rank may happen to be the slower one in a few steps before it becomes slow.
    assert alarm["rank"] == 1 and HEALTHY < alarm["step"] <= HEALTHY + 20
    assert alarm["since"] == alarm["step"] - 19 and alarm["value"] > alarm["threshold"] == 1.1
    assert (alarm["action"], alarm["host"]) == ("note", socket.gethostname())
    steps = f"in steps {alarm['since']} to {alarm['step']}, it took {alarm['value']:.2f} times"
    named = f"rank 1 ({alarm['host']}): all ranks waited for this rank, because {steps}"
    assert len(late) == 1 and late[0].startswith(named), late
    assert f"step {alarm['step']}: {named}" in job.stderr and "mhr doctor" in job.stderr
