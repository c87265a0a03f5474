"""``mpirun`` starts the program itself, one process for each rank."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import environment
from program.launched import PROGRAM, metrics

from megatron_hyperrouter.guard.events import read_events

TINY = (
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 64 --num-layers 1 --hidden-size 32 "
    "--num-attention-heads 4 --moe-ffn-hidden-size 32 --seq-length 32 --num-experts 4 --micro-batch-size 2 "
    "--train-iters 2 --eval-interval 0 --lr-warmup-iters 0 --expert-model-parallel-size 2"
).split()


@pytest.mark.processes
@pytest.mark.by_hand
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun on this machine")
def test_two_ranks(tmp_path: Path) -> None:
    mpirun = ["mpirun", "--oversubscribe", "-n", "2"]
    mpirun += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*mpirun, sys.executable, str(PROGRAM), *TINY, "--run-dir", "run"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    assert read_events(tmp_path / "run" / "events.jsonl")[0]["world_size"] == 2
