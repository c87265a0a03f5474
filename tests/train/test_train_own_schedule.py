"""resuming/schedule.py: a run that continues with the schedule of its checkpoint, not of its command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_hyperrouter.checkpoint.description import SETTINGS
from megatron_hyperrouter.checkpoint.manifest import fingerprint
from megatron_hyperrouter.config.cli import dump, parse
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.train.lr import learning_rate_at
from megatron_hyperrouter.train.resuming.schedule import with_own_schedule
from megatron_hyperrouter.train.resuming.start import Start, settings_again

BEFORE = "--data-path x --train-iters 40 --lr 1e-2 --min-lr 1e-3 --lr-warmup-iters 4 --weight-decay 0.1"
NOW = "--data-path x --train-iters 60 --lr 5e-3 --lr-decay-style linear --weight-decay 0.2"
GROWING = " --global-batch-size 16 --micro-batch-size 4 --rampup-batch-size 4 4 64"
TAKEN = "--use-checkpoint-opt_param-scheduler"


def settings(words: str) -> RunConfig:
    return parse(words.split(), routers=ROUTERS)


def start_of(folder: Path, before: str, step: int = 10) -> Start:
    (folder / SETTINGS).write_text(dump(settings(before)), encoding="utf-8")
    return Start(folder, manifest(folder, step))


def manifest(folder: Path, step: int = 10) -> dict[str, Any]:
    files = {path.name: fingerprint(path) for path in [folder / SETTINGS] if path.exists()}
    return {"step": step, "meta": {}, "files": files}


@pytest.mark.parametrize("more", ["", GROWING])
def test_the_rates_are_those_of_the_run_that_wrote_it(tmp_path: Path, more: str) -> None:
    before, now = settings(BEFORE + more), settings(f"{NOW}{more} {TAKEN}")
    found = with_own_schedule(now, start_of(tmp_path, BEFORE + more))
    consumed = 0
    for _ in range(40):
        consumed += 16 if not more or consumed > 64 else 4 + 4 * int(consumed / (64 / 3))
    end = -(-consumed // 16)  # full batches
    for step in range(1, 61):
        assert learning_rate_at(step, found.optimizer, 60) == learning_rate_at(step, before.optimizer, end)
    assert found.optimizer.weight_decay == 0.1
    assert replace(found, optimizer=now.optimizer) == now


def test_without_the_flag_the_command_counts(tmp_path: Path) -> None:
    now = settings(NOW)
    assert with_own_schedule(now, start_of(tmp_path, BEFORE)) == now


def test_a_run_that_begins_has_its_own(tmp_path: Path) -> None:
    now = settings(f"{NOW} {TAKEN}")
    assert with_own_schedule(now, Start()) == now
    start = start_of(tmp_path, BEFORE)
    assert with_own_schedule(now, replace(start, weights_only=True)) == now


@pytest.mark.parametrize(("text", "rule"), [(None, "is missing"), ("- lr\n", "has no settings")])
def test_a_checkpoint_that_does_not_say(tmp_path: Path, text: str | None, rule: str) -> None:
    if text is not None:
        (tmp_path / SETTINGS).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=rule) as caught:
        with_own_schedule(settings(f"{NOW} {TAKEN}"), Start(tmp_path, manifest(tmp_path)))
    assert "--lr-decay-style" in str(caught.value)


def test_the_settings_in_the_run_folder_start_it_again(tmp_path: Path) -> None:
    """What is said of a checkpoint has no meaning without it."""
    (tmp_path / "checkpoints").mkdir()
    now = settings(f"{NOW} {TAKEN} --no-load-optim --no-load-rng --load {tmp_path} --run-dir {tmp_path}")
    again = settings_again(now, start_of(tmp_path, BEFORE))
    path = tmp_path / "config.yaml"
    path.write_text(dump(again), encoding="utf-8")
    assert parse(["--config", str(path)], routers=ROUTERS) == again
