"""Kills of one rank or of all at random moments of background saves: nothing is lost or incomplete."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from program.launched import Job, Zygote, metrics
from program.settings import STEPS, flags_of
from program.test_program_killed import PACE, folders_are_alike, has_written

from megatron_hyperrouter.checkpoint.folder import find, read_manifest

pytestmark = pytest.mark.processes
ROUTER = "--router.name hyper --moe-router-topk 2 --hidden-dropout 0.1"
TP2, EP2, PP2 = (f"--{kind}-model-parallel-size 2" for kind in ("tensor", "expert", "pipeline"))
LAYOUTS = {
    "deepspeed, EP2, ZeRO-2": (2, f"{EP2} --zero-stage 2"),
    "megatron, DP2, distributed": (2, "--engine megatron --use-distributed-optimizer"),
    "megatron, PP2": (2, f"--engine megatron {PP2}"),
    "deepspeed, TP2 x EP2": (4, f"{TP2} {EP2}"),
}


def killed_again_and_again(
    zygote: Zygote, flags: list[str], run_dir: Path, dice: random.Random, *, ranks: int, kills: int
) -> int:
    """Saves at every step; each kill comes in or near a save.  Returns how many kills hit a running save."""
    inside = 0
    for number in range(kills):
        job = zygote.start(flags, ranks=ranks, pace=PACE)
        reached = 1 + number * (STEPS - 2) // max(kills, 1)
        assert job.wait_for(lambda: has_written(run_dir, reached)), job.stderr  # noqa: B023 - called at once
        time.sleep(dice.uniform(0.0, 3 * PACE))
        inside += bool(list((run_dir / "checkpoints").glob(".writing-*")))
        kill(job, dice.choice([None, *range(ranks)]))
        newest = find(run_dir)
        if newest is not None:
            assert read_manifest(newest)["step"] == int(newest.name[-7:])
    return inside


def kill(job: Job, rank: int | None) -> None:
    """One rank, and the others a moment later, as a launcher does; or all at once."""
    if rank is not None:
        os.kill(job.pids[rank], signal.SIGKILL)  # itself: a fresh fork leads no group yet
        time.sleep(0.1)
    job.kill()
    assert all(status is not None for status in job.wait().statuses)


def the_run_is_whole(
    zygote: Zygote, text: Path, root: Path, layout: tuple[int, str], *, kills: int, seed: int
) -> int:
    ranks, flags_of_layout = layout
    words = [*ROUTER.split(), *flags_of_layout.split()]
    often = ("--save-interval", 1)
    zygote.run(flags_of(text, root / "whole", "--save-interval", 6, layout=words), ranks=ranks)
    flags = flags_of(text, root / "run", "--load", root / "run", *often, layout=words)
    inside = killed_again_and_again(
        zygote, flags, root / "run", random.Random(seed), ranks=ranks, kills=kills
    )
    zygote.run(flags, ranks=ranks)
    assert metrics(root / "run") == metrics(root / "whole")
    folders_are_alike(root / "run", root / "whole")
    assert not list((root / "run/checkpoints").glob(".writing*"))
    return inside


def test_three_kills(zygote: Zygote, text: Path, tmp_path: Path) -> None:
    the_run_is_whole(zygote, text, tmp_path, LAYOUTS["deepspeed, EP2, ZeRO-2"], kills=3, seed=1)


@pytest.mark.by_hand
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fifty_kills(zygote: Zygote, text: Path, tmp_path: Path, layout: str) -> None:
    """13 on each of four layouts."""
    inside = the_run_is_whole(zygote, text, tmp_path, LAYOUTS[layout], kills=13, seed=len(layout))
    assert inside >= 1


def test_files_of_both_ways_to_save_are_equal(zygote: Zygote, text: Path, tmp_path: Path) -> None:
    words = ROUTER.split()
    for name, flag in (("behind", "--async-save"), ("waits", "--no-async-save")):
        zygote.run(flags_of(text, tmp_path / name, flag, "--train-iters", 3, layout=words))
    one, other = (find(tmp_path / name) for name in ("behind", "waits"))
    assert one is not None and other is not None
    files = {path.name for path in one.iterdir()} - {"manifest.json", "settings.yaml"}
    assert files == {path.name for path in other.iterdir()} - {"manifest.json", "settings.yaml"}
    assert {"optimizer.json", "optimizer-00000.safetensors", "random-00000.json"} <= files
    for name in files:
        if (one / name).is_file():
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
