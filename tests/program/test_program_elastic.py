"""``--elastic``: a run that changes from 4 ranks to 2 and back equals the run that did not."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from fakes import Alone
from program.launched import Job, Zygote, metrics
from program.settings import flags_of

from megatron_hyperrouter.checkpoint.folder import CheckpointFolders
from megatron_hyperrouter.commands.training.elastic import laid_out_anew
from megatron_hyperrouter.errors import ConfigError

pytestmark = pytest.mark.processes
LAYOUT = (
    "--router.name hyper --moe-router-topk 2 --expert-model-parallel-size 2 --micro-batch-size 2 "
    "--global-batch-size 8 --eval-interval 0 --eval-iters 0 --save-interval 2 --elastic"
).split()
NUMBERS = ("lm_loss", "aux_loss", "grad_norm")


@pytest.fixture(scope="module")
def runs(
    zygote: Zygote, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, list[Job]]:
    folder = tmp_path_factory.mktemp("elastic")
    stayed, moved = folder / "stayed", folder / "moved"
    zygote.run(flags_of(text, stayed, "--train-iters", 6, layout=LAYOUT), ranks=4)
    jobs = [
        zygote.run(
            flags_of(text, moved, "--train-iters", 6, "--load", moved, *stop, layout=LAYOUT),
            ranks=ranks,
            expect=6 if stop else 0,
        )
        for ranks, stop in ((4, ("--exit-interval", 2)), (2, ("--exit-interval", 4)), (4, ()))
    ]
    return stayed, moved, jobs


def test_the_run_is_the_one_that_stayed(runs: tuple[Path, Path, list[Job]]) -> None:
    stayed, moved = ([line for line in metrics(folder) if "split" not in line] for folder in runs[:2])
    assert [line["step"] for line in moved] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(moved, stayed, strict=True):
        for name in NUMBERS:
            assert one[name] == pytest.approx(other[name], rel=1e-5), (one["step"], name)
        assert one["consumed_samples"] == other["consumed_samples"]


def test_it_says_what_it_chose(runs: tuple[Path, Path, list[Job]]) -> None:
    _, _, (first, second, third) = runs
    size = "micro-batch size = 2, micro-batches per rank in each step ="
    assert f"--elastic: the run has 4 ranks; data-parallel size = 4, {size} 1" in first.stdout
    assert f"--elastic: the run has 2 ranks instead of 4; data-parallel size = 2, {size} 2" in second.stdout
    assert (
        "--elastic: the run has 4 ranks instead of 2" in third.stdout
        and "the global batch size stays 8" in third.stdout
    )


def test_ranks_that_cannot_do(zygote: Zygote, text: Path, tmp_path: Path) -> None:
    flags = flags_of(text, tmp_path / "run", "--dry-run", "--world-size", 3, layout=LAYOUT)
    refused = zygote.run(flags, ranks=1, expect=2)
    assert "ranks started = 3" in refused.stderr and "start 2 or 4 ranks" in refused.stderr


def test_a_micro_batch_that_does_not_divide_is_made_smaller(
    zygote: Zygote, text: Path, tmp_path: Path
) -> None:
    flags = flags_of(text, tmp_path / "run", "--dry-run", "--world-size", 8, layout=LAYOUT)
    told = zygote.run(flags, ranks=1)
    assert (
        "data-parallel size = 8, micro-batch size = 1, micro-batches per rank in each step = 1" in told.stdout
    )
    assert "the micro-batch size is 1 instead of 2" in told.stdout


@pytest.mark.parametrize(("restarts", "batch"), [("0", "1"), ("1", "4")])
def test_a_restart_by_torchrun_keeps_the_global_batch_size_without_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: str, batch: str
) -> None:
    """Such a run continues from its own checkpoint, whose batch size counts."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    meta = {"layout": {"world_size": 4}, "order": {"global_batch_size": 4}}
    CheckpointFolders(tmp_path / "checkpoints", Alone()).save(
        2, lambda folder: (folder / "a").write_bytes(b"a"), meta
    )
    began = {"event": "start", "time": time.time(), "step": 0, "attempt": 1}
    (tmp_path / "events.jsonl").write_text(json.dumps(began) + "\n")
    flags = ["--mock-data", "--elastic", "--micro-batch-size", "1", "--run-dir", str(tmp_path)]
    words = laid_out_anew(flags, 1, [])
    assert words[-2:] == ["--global-batch-size", batch]


def test_samples_without_a_global_batch_size_are_refused(tmp_path: Path) -> None:
    """On other ranks, the same samples would be another number of steps than in the interrupted run."""
    with pytest.raises(ConfigError, match="--train-samples = 8: needs --global-batch-size"):
        laid_out_anew(["--mock-data", "--elastic", "--train-samples", "8"], 2, [])
    off = ["--mock-data", "--elastic", "false", "--train-samples", "8"]
    assert laid_out_anew(off, 2, []) == off
    file = tmp_path / "run.yaml"
    file.write_text("elastic: true\nmock_data: true\ntrain_samples: 8\n")
    with pytest.raises(ConfigError):
        laid_out_anew(["--config", str(file)], 2, [])
    assert laid_out_anew(["--config", str(file), "--no-elastic"], 2, [])
