"""``examples/cluster/slurm.sh`` on a real Slurm of two nodes: jobs that are stopped, killed and refused."""

from __future__ import annotations

import csv
import json
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster.slurm_cluster import Slurm, missing, slurm_of_two_nodes
from distributed import REPOSITORY, environment, free_port
from program.launched import metrics

from megatron_hyperrouter.guard.events import read_events
from megatron_hyperrouter.guard.heartbeat import read_beats
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

STUDY = """
mock_data: true
tokenizer_type: NullTokenizer
vocab_size: 64
num_layers: 2
hidden_size: 32
num_attention_heads: 4
moe_ffn_hidden_size: 32
seq_length: 32
num_experts: 4
micro_batch_size: 2
"""
STUDIED = ["--ranks", 1, 2, "--layouts", "", "ep=2", "--warmup", 1, "--steps", 3, "--repeats", 1]


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


def wait(
    slurm: Slurm, job: str, happened: Callable[[], object], seconds: float = 240, every: float = 0.1
) -> None:
    """``every``: seconds between two looks; a question to Slurm costs more than a look at a file."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            raise AssertionError(f"{slurm.job(job)}\n{said(slurm, job)}\n{slurm.logs()}")
        time.sleep(every)


def has_ended(slurm: Slurm, job: str) -> bool:
    return slurm.job(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def lines_of(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


LIMIT = 24.0  # seconds that a collective may take


@pytest.mark.parametrize("launcher", ["srun", pytest.param("torchrun", marks=pytest.mark.by_hand)])
def test_stopped_killed_and_suspended_at_random_steps(slurm: Slurm, launcher: str) -> None:
    """Each time the job requeues itself; in the end every step stands once."""
    run_dir, dice = slurm.root / f"run-{launcher}", random.Random(launcher)
    words = [*TINY, "--run-dir", run_dir, "--expert-model-parallel-size", 2]
    words += ["--distributed-timeout-minutes", LIMIT / 60]
    job = submit(slurm, *words, nodes=2, LAUNCHER=launcher)
    for attempt, disturb in enumerate((stop_all, kill_all, kill_one, suspend_one)):
        wait(slurm, job, lambda attempt=attempt: len(openings(run_dir)) > attempt)
        aim = openings(run_dir)[-1] + dice.randint(25, 60)
        wait(slurm, job, lambda aim=aim: lines_of(run_dir) >= aim)
        disturb(slurm, job, run_dir)
        wait(slurm, job, lambda attempt=attempt: int(slurm.job(job)["Restarts"]) == attempt + 1, every=0.5)
    assert_finished(slurm, job, run_dir, restarts=4)
    causes = status_of(read_trace(run_dir)).causes
    assert "was stopped by SIGTERM" in causes[0] and "killed" in causes[1]
    opening = read_events(run_dir / "events.jsonl")[0]
    assert opening["world_size"] == 2 and f"SLURM_JOB_ID={job}" in str(opening["job"])


def stop_all(slurm: Slurm, job: str, run_dir: Path) -> None:
    """As before a time limit."""
    slurm.run("scancel", "--signal=TERM", f"{job}.0")


def kill_all(slurm: Slurm, job: str, run_dir: Path) -> None:
    slurm.run("scancel", "--signal=KILL", f"{job}.0")


def kill_one(slurm: Slurm, job: str, run_dir: Path) -> None:
    os.kill(pid_of_rank_1(run_dir), signal.SIGKILL)


def suspend_one(slurm: Slurm, job: str, run_dir: Path) -> None:
    """It is named within twice the limit."""
    os.kill(pid_of_rank_1(run_dir), signal.SIGSTOP)
    wait(slurm, job, lambda: names_rank_1(run_dir), seconds=2 * LIMIT)


def pid_of_rank_1(run_dir: Path) -> int:
    return read_beats(run_dir / "heartbeat")[1].pid


def names_rank_1(run_dir: Path) -> bool:
    """In ``mhr status``, or in the event that ended the attempt."""
    status = status_of(read_trace(run_dir))
    return any("rank 1" in text for text in (*status.late, status.reason))


def assert_finished(slurm: Slurm, job: str, run_dir: Path, *, restarts: int) -> None:
    wait(slurm, job, lambda: has_ended(slurm, job), every=0.5)
    assert slurm.job(job)["JobState"] == "COMPLETED", said(slurm, job)
    assert [line["step"] for line in metrics(run_dir) if "split" not in line] == list(range(1, STEPS + 1))
    status = status_of(read_trace(run_dir))
    assert (status.state, status.restarts) == ("finished", restarts)


def openings(run_dir: Path) -> list[int]:
    """The steps after which the attempts began."""
    events = read_events(run_dir / "events.jsonl")
    return [int(str(each["step"])) for each in events if each["event"] in ("start", "resume")]


NO_MOCK = [word for word in TINY if word != "--mock-data"]
NEVER_AGAIN = {
    2: ([*TINY, "--moe-router-topk", 9], "the settings"),
    3: ([*NO_MOCK, "--data-path", "/no/such/prefix"], "the data"),
    5: ([*TINY, "--transformer-impl", "transformer_engine"], "the installation"),
}


def test_no_restart_where_it_cannot_help(slurm: Slurm) -> None:
    jobs = {
        status: submit(slurm, *words, "--run-dir", slurm.root / f"refused-{status}", nodes=1 + (status == 2))
        for status, (words, _) in NEVER_AGAIN.items()
    }
    for status, job in jobs.items():
        wait(slurm, job, lambda job=job: has_ended(slurm, job), every=0.5)
        found = slurm.job(job)
        ended = ("FAILED", f"{status}:0", "0")
        assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ended, said(slurm, job)
        assert f"a restart does not solve a problem with {NEVER_AGAIN[status][1]}" in said(slurm, job)


def test_a_trial_without_data_trains_without_editing_a_file(slurm: Slurm) -> None:
    """After an examination of the machine."""
    run_dir = slurm.root / "trial"
    short = "--mock-data --train-iters 2 --lr-warmup-iters 0 --eval-interval 0 --run-dir".split()
    job = submit(slurm, *short, run_dir, nodes=1, DOCTOR="1")
    wait(slurm, job, lambda: has_ended(slurm, job), every=0.5)
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
    wait(slurm, job, lambda: has_ended(slurm, job), every=0.5)
    time.sleep(2.0)
    found = slurm.job(job)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0"), said(slurm, job)


@pytest.mark.by_hand
def test_srun_starts_the_program_itself(slurm: Slurm, tmp_path: Path) -> None:
    """One task a rank, without the script."""
    program = [sys.executable, REPOSITORY / "pretrain_gpt_hyperrouter.py", *TINY, "--train-iters", 3]
    program += ["--topk-schedule", "linear", "--lr-warmup-iters", 0]
    program += ["--run-dir", tmp_path / "run", "--expert-model-parallel-size", 2]
    slurm.run("srun", "-N2", "-n2", *program, timeout=240)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]
    assert read_events(tmp_path / "run" / "events.jsonl")[0]["world_size"] == 2


@pytest.mark.by_hand
def test_a_study_is_submitted_and_collected(slurm: Slurm, tmp_path: Path) -> None:
    """As docs/scaling.md says: the printed commands submit a job for each run."""
    (tmp_path / "run.yaml").write_text(STUDY, encoding="utf-8")
    study = [sys.executable, "-m", "megatron_hyperrouter", "scaling", "speed", "--config"]
    study += [tmp_path / "run.yaml", "--output", tmp_path / "out", *STUDIED]
    printed = slurm.run(*study, "--dry-run", "--gpus-per-node", 2, folder=REPOSITORY, timeout=240)
    jobs = []
    for line in printed.splitlines():
        start, *words = shlex.split(line)
        (gpus,) = (word for word in words if word.startswith("--gpus-per-node="))
        words.remove(gpus)  # these nodes have none
        more = {"RANKS_PER_NODE": gpus.partition("=")[2]}
        words = [start, "--parsable", f"--output={slurm.root}/job-%j.out", *words]
        jobs.append(slurm.run(*words, folder=REPOSITORY, **more).strip())
    assert len(jobs) == 3
    for job in jobs:
        wait(slurm, job, lambda job=job: has_ended(slurm, job), seconds=400)
        assert slurm.job(job)["JobState"] == "COMPLETED", said(slurm, job)
    slurm.run(*study, "--collect", folder=REPOSITORY, timeout=240)
    with (tmp_path / "out" / "runs.csv").open(newline="") as file:
        found = [row["ranks"] for row in csv.DictReader(file)]
    assert sorted(found) == ["1", "2", "2"]
