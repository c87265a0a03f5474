"""Kills at any moment, SIGTERM, a full disk: the same command with --load gives the run that was never
stopped, bit for bit.
"""

from __future__ import annotations

import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from program.launched import Job, Zygote, metrics, one_message
from program.settings import RANKS, STEPS, flags_of

from megatron_hyperrouter.checkpoint.folder import find
from megatron_hyperrouter.errors import STOPPED

pytestmark = pytest.mark.processes
PACE = 0.05  # seconds more for each step: a signal comes before the run is over, on a busy machine too


def folders_are_alike(run_dir: Path, other: Path) -> None:
    """Every byte of the last weights."""
    last = f"checkpoints/step_{STEPS:07d}"
    names, expected = (
        sorted(path.name for path in (folder / last).glob("weights-*")) for folder in (run_dir, other)
    )
    assert len(names) > 1 and names == expected
    for name in names:
        assert (run_dir / last / name).read_bytes() == (other / last / name).read_bytes(), name


def has_written(run_dir: Path, steps: int) -> bool:
    """Whether ``metrics.jsonl`` of a run that is still writing it has come to this step."""
    path = run_dir / "metrics.jsonl"
    return path.exists() and f'{{"step": {steps}, '.encode() in path.read_bytes()


def has_come_to(run_dir: Path, steps: int) -> bool:
    """The same, and the save of step 3, which a thread writes, is published if it is due."""
    return has_written(run_dir, steps) and (steps <= 3 or (run_dir / "checkpoints" / "latest").exists())


def killed_at(
    moments: list[int | str],
    zygote: Zygote,
    flags: list[str],
    run_dir: Path,
    dice: random.Random,
    *,
    ranks: int,
    **more: object,
) -> list[list[str]]:
    """Start the run again and again, and kill all ranks at each moment; returns what lay in
    ``checkpoints/`` after each kill.

    A number: so many steps are written.  A pattern: a save has come so far, and its next file is on its
    way to the disk.
    """
    folders, left_behind = run_dir / "checkpoints", []
    for moment in moments:
        stall = {"stall_at": str(folders / moment)} if isinstance(moment, str) else {"pace": PACE}
        job = zygote.start(flags, ranks=ranks, **stall, **more)
        there = (
            (job.folder / "stalled").exists
            if isinstance(moment, str)
            else partial(has_come_to, run_dir, moment)
        )
        assert job.wait_for(there), job.stderr
        time.sleep(dice.uniform(0.0, PACE))
        job.kill()
        assert job.wait().statuses == [-signal.SIGKILL] * ranks
        left_behind.append(sorted(path.name for path in folders.glob("*")))
    return left_behind


class TestKilled:
    def test_at_five_random_moments(self, zygote: Zygote, text: Path, whole: Path, tmp_path: Path) -> None:
        run_dir, dice = tmp_path / "run", random.Random(2)
        folders = run_dir / "checkpoints"
        flags = flags_of(text, run_dir, "--load", run_dir)
        moments: list[int | str] = [
            dice.choice((1, 2)),
            ".writing-*",
            3 + dice.choice((1, 2)),
            dice.choice((".writing-*/manifest.json", ".latest-*")),
            "step_0000006",  # the folder has its name, but latest does not know it
        ]
        left_behind = killed_at(moments, zygote, flags, run_dir, dice, ranks=RANKS)
        assert left_behind[1] == [".writing-step_0000003"]
        assert ".writing-step_0000006" in left_behind[3] and {"step_0000006", ".latest-step_0000006"} <= {
            *left_behind[4]
        }
        zygote.run(flags, ranks=RANKS)
        assert metrics(run_dir) == metrics(whole)
        folders_are_alike(run_dir, whole)
        assert not list(folders.glob(".*"))

    def test_the_run_has_every_step_once(self, whole: Path) -> None:
        steps = [record["step"] for record in metrics(whole) if "split" not in record]
        assert steps == list(range(1, STEPS + 1))


# The same dropout and the same growing k as on two ranks
K_AND_DROPOUT = (
    "--router.name hyper --moe-router-topk 3 --topk-schedule linear --topk-start 1 "
    "--hidden-dropout 0.1 --attention-dropout 0.1"
)
ON_FOUR_RANKS = {
    "megatron": "--engine megatron --tensor-model-parallel-size 2 --sequence-parallel "
    "--expert-model-parallel-size 2",
    "deepspeed": "--engine deepspeed --pipeline-model-parallel-size 2 --expert-model-parallel-size 2 "
    "--zero-stage 1",
}


@pytest.mark.parametrize("engine", ON_FOUR_RANKS)
def test_killed_on_four_ranks(zygote: Zygote, text: Path, tmp_path: Path, engine: str) -> None:
    """TP2 x EP2 and PP2 x EP2: killed between two steps, then inside a save; the rest is the rest of a
    run that nobody killed.
    """
    layout = [*K_AND_DROPOUT.split(), *ON_FOUR_RANKS[engine].split()]
    zygote.run(flags_of(text, tmp_path / "whole", layout=layout), ranks=4)
    run_dir, dice = tmp_path / "run", random.Random(engine)
    flags = flags_of(text, run_dir, "--load", run_dir, layout=layout)
    moments: list[int | str] = [
        3 + dice.choice((1, 2)),
        dice.choice((".writing-*", ".writing-*/manifest.json", ".latest-*")),
    ]
    between, inside = killed_at(moments, zygote, flags, run_dir, dice, ranks=4)
    assert "latest" in between and any(name.startswith((".writing-", ".latest-")) for name in inside)
    before = find(run_dir)
    assert (
        before is not None
        and f"continuing after step {int(before.name[-7:])} of " in zygote.run(flags, ranks=4).stdout
    )
    assert metrics(run_dir) == metrics(tmp_path / "whole")
    folders_are_alike(run_dir, tmp_path / "whole")


class TestStopped:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
    def test_saves_exits_with_6_and_continues_from_its_own_settings(
        self, zygote: Zygote, text: Path, whole: Path, tmp_path: Path, number: signal.Signals
    ) -> None:
        run_dir = tmp_path / "run"
        job = zygote.start(flags_of(text, run_dir, "--save-interval", 0), ranks=RANKS, pace=PACE)
        assert job.wait_for(partial(has_written, run_dir, 4))
        job.kill(number)
        assert job.wait().statuses == [STOPPED] * RANKS, job.stderr
        stopped = metrics(run_dir)[-1]["step"]
        folder = find(run_dir)
        assert 4 <= stopped < STEPS and folder is not None and folder.name == f"step_{stopped:07d}"
        assert f"stopped by {number.name} after step {stopped}; continue with --load {run_dir}" in job.stdout
        zygote.run(["--config", run_dir / "config.yaml", "--load", run_dir], ranks=RANKS)
        assert metrics(run_dir) == metrics(whole)
        folders_are_alike(run_dir, whole)


class TestFullDisk:
    def test_ends_with_4_and_the_old_checkpoint_survives(
        self, zygote: Zygote, text: Path, whole: Path, tmp_path: Path
    ) -> None:
        run_dir = tmp_path / "run"
        flags = flags_of(text, run_dir, "--load", run_dir)
        job = zygote.start(flags, ranks=RANKS, pace=PACE)
        assert job.wait_for((run_dir / "checkpoints/latest").exists)
        job.kill()
        job.wait()
        before = find(run_dir)
        assert before is not None
        folders = {path.name for path in before.parent.glob("[!.]*")}
        job = zygote.run(flags, ranks=RANKS, largest_file=60_000, expect=4)
        message = one_message(job.stderr)
        assert (
            "could not be saved" in message
            and "free up space on that disk" in message
            and f"--load {before}" in message
        )
        after = {path.name for path in before.parent.iterdir()}
        assert find(run_dir) == before and {"latest", before.name} <= after <= folders | {"proved"}
        zygote.run(flags, ranks=RANKS)
        assert metrics(run_dir) == metrics(whole)


def test_job_reports_what_it_should(zygote: Zygote, tmp_path: Path) -> None:
    """The part of a launcher that ``Job`` plays: one rank's failure ends the other, and its status is
    told.
    """
    program = tmp_path / "program.py"
    program.write_text("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(60)\n")
    job: Job = zygote.run([], ranks=2, program=program, expect=3)
    assert job.statuses == [-signal.SIGTERM, 3]
