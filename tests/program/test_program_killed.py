"""Kills at any moment, SIGTERM, a full disk: the same command with --load gives the run that was never stopped, bit for bit."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from program.launched import Job, Zygote, metrics, one_message
from program.settings import RANKS, STEPS, flags_of

from megatron_hyperrouter.checkpoint.folder import find

pytestmark = pytest.mark.processes
SLOW = 0.1  # seconds for each fsync: a save then takes about one


def folders_are_alike(run_dir: Path, other: Path) -> None:
    """Every byte of the last weights."""
    last = f"checkpoints/step_{STEPS:07d}"
    names = sorted(path.name for path in (run_dir / last).glob("weights-*"))
    assert len(names) == RANKS
    for name in names:
        assert (run_dir / last / name).read_bytes() == (other / last / name).read_bytes(), name


def steps_written(run_dir: Path) -> int:
    """Training steps in ``metrics.jsonl`` of a run that is still writing it."""
    path = run_dir / "metrics.jsonl"
    return sum(b'"lm_loss"' in line and b'"split"' not in line for line in path.read_bytes().splitlines()) if path.exists() else 0


def saving(run_dir: Path, pattern: str) -> Callable[[], bool]:
    """Whether a save is under way and has come as far as ``pattern``."""
    return lambda: any((run_dir / "checkpoints").glob(pattern))


class TestKilled:
    def test_at_five_random_moments(self, zygote: Zygote, text: Path, whole: Path, tmp_path: Path) -> None:
        run_dir, dice = tmp_path / "run", random.Random(2)
        flags = flags_of(text, run_dir, "--load", run_dir)
        # Before the first checkpoint, early in its save, between two, late in a save, and after that.
        moments: list[Callable[[], bool]] = [
            lambda: steps_written(run_dir) >= 1,
            saving(run_dir, ".writing-*"),
            lambda: steps_written(run_dir) >= 3 + dice.choice((1, 2)),
            saving(run_dir, ".writing-*/manifest.json"),
            lambda: steps_written(run_dir) >= 6 + dice.choice((1, 2, 3)),
        ]
        left_behind = []
        for moment in moments:
            job = zygote.start(flags, ranks=RANKS, slow_disk=SLOW)
            assert job.wait_for(moment), job.stderr
            time.sleep(dice.uniform(0.0, SLOW))
            job.kill()
            assert job.wait().statuses == [-signal.SIGKILL] * RANKS
            left_behind += list((run_dir / "checkpoints").glob(".*"))
        assert len(left_behind) >= 2  # two saves were cut short
        zygote.run(flags, ranks=RANKS)
        assert metrics(run_dir) == metrics(whole)
        folders_are_alike(run_dir, whole)
        assert not list((run_dir / "checkpoints").glob(".*"))

    def test_the_run_has_every_step_once(self, whole: Path) -> None:
        steps = [record["step"] for record in metrics(whole) if "split" not in record]
        assert steps == list(range(1, STEPS + 1))


class TestSigterm:
    def test_saves_exits_with_0_and_goes_on_from_its_own_settings(self, zygote: Zygote, text: Path, whole: Path, tmp_path: Path) -> None:
        run_dir = tmp_path / "run"
        job = zygote.start(flags_of(text, run_dir, "--save-interval", 0), ranks=RANKS)
        assert job.wait_for(lambda: steps_written(run_dir) >= 4)
        job.kill(signal.SIGTERM)
        assert job.wait().statuses == [0] * RANKS, job.stderr
        stopped = metrics(run_dir)[-1]["step"]
        folder = find(run_dir)
        assert 4 <= stopped < STEPS and folder is not None and folder.name == f"step_{stopped:07d}"
        assert f"stopped by SIGTERM after step {stopped}; continue with --load {run_dir}" in job.stdout
        zygote.run(["--config", run_dir / "config.yaml", "--load", run_dir], ranks=RANKS)
        assert metrics(run_dir) == metrics(whole)
        folders_are_alike(run_dir, whole)


class TestFullDisk:
    def test_ends_with_4_and_the_old_checkpoint_survives(self, zygote: Zygote, text: Path, whole: Path, tmp_path: Path) -> None:
        run_dir = tmp_path / "run"
        flags = flags_of(text, run_dir, "--load", run_dir)
        job = zygote.start(flags, ranks=RANKS)
        assert job.wait_for(lambda: (run_dir / "checkpoints/latest").exists())
        job.kill()
        job.wait()
        before = find(run_dir)
        assert before is not None
        job = zygote.run(flags, ranks=RANKS, largest_file=60_000, expect=4)
        message = one_message(job.stderr)
        assert "could not be saved" in message and "make room on that disk" in message and f"--load {before}" in message
        assert find(run_dir) == before and sorted(path.name for path in before.parent.iterdir()) == ["latest", before.name]
        zygote.run(flags, ranks=RANKS)
        assert metrics(run_dir) == metrics(whole)


def test_job_reports_what_it_should(zygote: Zygote, tmp_path: Path) -> None:
    """The part of a launcher that ``Job`` plays: one rank's failure ends the other, and its status is told."""
    program = tmp_path / "program.py"
    program.write_text("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(60)\n")
    job: Job = zygote.run([], ranks=2, program=program, expect=3)
    assert job.statuses == [-signal.SIGTERM, 3]
