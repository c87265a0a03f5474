"""A launcher that dies, and a rank that hangs: no process stays, and the run reports what happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from distributed import environment, free_port
from program.launched import PROGRAM, Zygote, metrics
from program.settings import RANKS, flags_of
from program.test_program_killed import PACE, has_written

from megatron_hyperrouter.checkpoint.folder import find, folder_name
from megatron_hyperrouter.errors import STOPPED
from megatron_hyperrouter.guard.events import read_events

pytestmark = pytest.mark.processes
ENDLESS = "--train-iters 100000 --save-interval 0 --eval-interval 0 --log-interval 1000".split()
WITHIN = (
    60.0  # seconds from the end of the launcher to that of the ranks; a busy machine needs more than a few
)
LAYOUTS = {
    "deepspeed": "--moe-router-topk 2 --zero-stage 2",
    "stages": "--moe-router-topk 2 --pipeline-model-parallel-size 2",
    "megatron": "--engine megatron --moe-router-topk 2 --tensor-model-parallel-size 2 --sequence-parallel",
}


def saved_and_stopped(run_dir: Path) -> int:
    """The run ended after a step with a checkpoint of it; returns the step."""
    (stop,) = (event for event in read_events(run_dir / "events.jsonl") if event["event"] == "stop")
    last = metrics(run_dir)[-1]["step"]
    assert stop["reason"] == "the end of the launcher" and stop["step"] == last
    folder = find(run_dir)
    assert folder is not None and folder.name == folder_name(int(last))
    return int(last)


def numbers(run_dir: Path) -> list[tuple[object, ...]]:
    """What each step computed."""
    wanted = ("step", "lm_loss", "aux_loss", "grad_norm", "learning_rate")
    return [tuple(record[name] for name in wanted) for record in metrics(run_dir) if "split" not in record]


@pytest.mark.parametrize("engine", LAYOUTS)
def test_ranks_whose_launcher_died_save_and_stop(
    zygote: Zygote, text: Path, tmp_path: Path, engine: str
) -> None:
    run_dir = tmp_path / "run"
    flags = flags_of(text, run_dir, *ENDLESS, layout=LAYOUTS[engine].split())
    job = zygote.start(flags, ranks=RANKS, pace=PACE, launcher=True)
    assert job.wait_for(partial(has_written, run_dir, 3)), job.stderr
    before = metrics(run_dir)[-1]["step"]
    for launcher in job.launchers:
        os.kill(launcher, signal.SIGKILL)
    assert job.wait(WITHIN).statuses == [STOPPED] * RANKS, job.stderr
    last = saved_and_stopped(run_dir)
    assert last <= before + 2  # written before the ranks knew; the one of that moment does not count
    ends = ("--exit-interval", last + 2)
    whole = tmp_path / "whole"
    jobs = [
        zygote.start([*flags, "--load", run_dir, *ends], ranks=RANKS),
        zygote.start(flags_of(text, whole, *ENDLESS, *ends, layout=LAYOUTS[engine].split()), ranks=RANKS),
    ]
    for each in jobs:
        assert each.wait(120).statuses == [STOPPED] * RANKS, each.stderr
    resumed, never_stopped = (numbers(folder) for folder in (run_dir, whole))
    assert resumed == never_stopped and len(resumed) == last + 2  # the step that was given up left no trace


@pytest.mark.skipif(
    shutil.which("deepspeed", path=str(Path(sys.executable).parent)) is None,
    reason="no deepspeed launcher beside this Python",
)
def test_sigterm_to_the_deepspeed_launcher_alone(text: Path, tmp_path: Path) -> None:
    """It dies at once, and passes the signal on to nobody."""
    run_dir = tmp_path / "run"
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    command = [deepspeed, "--num_gpus", "2", "--master_port", str(free_port()), str(PROGRAM)]
    flags = flags_of(text, run_dir, *ENDLESS, layout=LAYOUTS["deepspeed"].split())
    env = environment(PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin")
    with (tmp_path / "said.txt").open("w") as said:
        launcher = subprocess.Popen(
            [*command, *flags], cwd=tmp_path, env=env, stdout=said, stderr=said, start_new_session=True
        )
        try:
            wait_until(lambda: has_written(run_dir, 3) or launcher.poll() is not None, 240)
            pids = [json.loads(path.read_text())["pid"] for path in (run_dir / "heartbeat").glob("rank-*")]
            launcher.send_signal(signal.SIGTERM)
            launcher.wait(30)
            assert len(pids) == RANKS
            wait_until(lambda: not any(lives(pid) for pid in pids), WITHIN)
        finally:
            if any(lives(pid) for pid in [launcher.pid, *pids]):
                os.killpg(launcher.pid, signal.SIGKILL)
    saved_and_stopped(run_dir)


def test_a_rank_that_hangs_is_named(zygote: Zygote, text: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    flags = flags_of(text, run_dir, *ENDLESS, "--distributed-timeout-minutes", 0.2)
    job = zygote.start(flags, ranks=RANKS, pace=PACE)
    assert job.wait_for(partial(has_written, run_dir, 3)), job.stderr
    os.kill(job.pids[1], signal.SIGSTOP)
    try:
        wait_until(lambda: job.poll()[0] is not None, 60)
    finally:
        os.kill(job.pids[1], signal.SIGKILL)
    job.wait()
    assert job.statuses[0] == 1
    (line,) = (line for line in job.stderr.splitlines() if line.startswith("  rank 1 ("))
    assert f"pid {job.pids[1]}) has been in step " in line and "this rank has been silent for" in line
    assert "no progress for" in job.stderr and "Current thread" in job.stderr  # the stacks of rank 0


def wait_until(happened: Callable[[], bool], seconds: float) -> None:
    """At most so long."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def lives(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
