"""``examples/cluster/slurm.sh`` on a real Slurm of two nodes: jobs that are stopped, killed and refused."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster.slurm_cluster import Slurm, missing, slurm_of_two_nodes
from distributed import REPOSITORY, environment, free_port
from program.launched import metrics

from megatron_hyperrouter.guard.events import read_events
from megatron_hyperrouter.watch.status import status_of
from megatron_hyperrouter.watch.trace import read_trace

pytestmark = pytest.mark.processes
SCRIPT = REPOSITORY / "examples" / "cluster" / "slurm.sh"
STEPS = 400
TINY = (
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 64 "
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 "
    "--moe-ffn-hidden-size 32 --seq-length 32 --num-experts 4 --moe-router-topk 2 --topk-start 1 "
    f"--micro-batch-size 2 --global-batch-size 4 --train-iters {STEPS} --save-interval 20 "
    "--keep-checkpoints 2 --eval-interval 0 --log-interval 50"
).split()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes, whose names lead nowhere; the jobs use the environment of this Python."""
    if why := missing():
        pytest.skip(why)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = environment(PATH=path, VIRTUAL_ENV=sys.prefix, MASTER_ADDR="127.0.0.1")
    root = tmp_path_factory.mktemp("slurm") / "root"
    with slurm_of_two_nodes(root, [free_port() for _ in range(3)], env) as cluster:
        yield cluster


def submit(slurm: Slurm, *words: object, nodes: int, **env: str) -> str:
    """Returns the number of the job."""
    output = f"--output={slurm.root}/job-%j.out"
    return slurm.run(
        "sbatch", "--parsable", f"--nodes={nodes}", output, SCRIPT, *words, **env
    ).strip()  # fmt: skip


def said(slurm: Slurm, job: str) -> str:
    path = slurm.root / f"job-{job}.out"
    return path.read_text(errors="replace")[-4000:] if path.exists() else ""


def wait(slurm: Slurm, job: str, happened: Callable[[], object], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            raise AssertionError(f"{slurm.job(job)}\n{said(slurm, job)}\n{slurm.logs()}")
        time.sleep(0.1)


def has_ended(slurm: Slurm, job: str) -> bool:
    return slurm.job(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def lines_of(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("launcher", ["srun", pytest.param("torchrun", marks=pytest.mark.by_hand)])
def test_stopped_then_killed_at_random_steps(slurm: Slurm, launcher: str) -> None:
    """Each time the job requeues itself; in the end every step stands once."""
    run_dir, dice = slurm.root / f"run-{launcher}", random.Random(launcher)
    job = submit(
        slurm, *TINY, "--run-dir", run_dir, "--expert-model-parallel-size", 2, nodes=2, LAUNCHER=launcher
    )
    for attempt, number in enumerate(("TERM", "KILL")):
        wait(slurm, job, lambda attempt=attempt: len(openings(run_dir)) > attempt)
        begun = openings(run_dir)[-1]
        aim = begun + dice.randint(25, 60)
        wait(slurm, job, lambda aim=aim: lines_of(run_dir) >= aim)
        slurm.run("scancel", f"--signal={number}", f"{job}.0")
        wait(slurm, job, lambda attempt=attempt: int(slurm.job(job)["Restarts"]) == attempt + 1)
    wait(slurm, job, lambda: has_ended(slurm, job))
    assert slurm.job(job)["JobState"] == "COMPLETED", said(slurm, job)
    assert [line["step"] for line in metrics(run_dir) if "split" not in line] == list(range(1, STEPS + 1))
    status = status_of(read_trace(run_dir))
    assert (status.state, status.restarts) == ("finished", 2)
    assert "was stopped by SIGTERM" in status.causes[0] and "killed" in status.causes[1]
    opening = read_events(run_dir / "events.jsonl")[0]
    assert opening["world_size"] == 2 and f"SLURM_JOB_ID={job}" in str(opening["job"])


def openings(run_dir: Path) -> list[int]:
    """The steps after which the attempts began."""
    events = read_events(run_dir / "events.jsonl")
    return [int(str(each["step"])) for each in events if each["event"] in ("start", "resume")]


def test_refused_settings_are_not_started_again(slurm: Slurm) -> None:
    job = submit(slurm, *TINY, "--run-dir", slurm.root / "refused", "--moe-router-topk", 9, nodes=1)
    wait(slurm, job, lambda: has_ended(slurm, job))
    found = slurm.job(job)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "2:0", "0"), said(
        slurm, job
    )
    assert "a restart does not solve problems of settings" in said(slurm, job)


def test_a_trial_without_data_trains_without_editing_a_file(slurm: Slurm) -> None:
    """After an examination of the machine."""
    run_dir = slurm.root / "trial"
    short = "--mock-data --train-iters 2 --lr-warmup-iters 0 --eval-interval 0 --run-dir".split()
    job = submit(slurm, *short, run_dir, nodes=1, DOCTOR="1")
    wait(slurm, job, lambda: has_ended(slurm, job))
    assert slurm.job(job)["JobState"] == "COMPLETED", said(slurm, job)
    assert [line["step"] for line in metrics(run_dir)] == [1, 2]
    assert json.loads((run_dir / "doctor.json").read_text())["status"] == 0


@pytest.mark.by_hand
def test_a_cancelled_job_stays_cancelled(slurm: Slurm) -> None:
    """The run saves and ends with 6, as at a time limit; but a person wants it to end."""
    run_dir = slurm.root / "cancelled"
    job = submit(slurm, *TINY, "--run-dir", run_dir, "--train-iters", 100_000, nodes=1)
    wait(slurm, job, lambda: lines_of(run_dir) > 10)
    slurm.run("scancel", job)
    wait(slurm, job, lambda: has_ended(slurm, job))
    time.sleep(2.0)
    found = slurm.job(job)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0"), said(slurm, job)
