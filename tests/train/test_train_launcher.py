"""A launcher that dies in a step or an evaluation: the run stops at once and loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeEngine
from tiny_run import VOCAB_SIZE, settings
from train.loop_runs import Diary, Killed, change, lines, run

from megatron_hyperrouter.checkpoint.folder import find, folder_name
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.base import Batch, EvalResult, StepResult
from megatron_hyperrouter.guard.launcher import Launcher
from megatron_hyperrouter.guard.watchdog import Watchdog
from megatron_hyperrouter.train import metrics
from megatron_hyperrouter.train.metrics import Record


class Orphan(FakeEngine):
    """Its launcher dies in the forward pass of a step, or in the ``at``-th evaluation."""

    gone = False

    def __init__(self, *, step: int | None = None, evaluation: int | None = None) -> None:
        super().__init__(VOCAB_SIZE, topk_at=lambda step: 1 + step // 5)
        self._step, self._evaluation = step, evaluation
        self.evaluations = 0

    def _forward_backward(self, stop: Callable[[], int]) -> StepResult:
        Orphan.gone = self.steps_taken[-1] + 1 == self._step
        asked: list[int] = []
        result = super()._forward_backward(lambda: asked.append(stop()) or 0)  # type: ignore[func-returns-value]
        return replace(result, give_up=asked[0] > 1)

    def evaluate(self, batches: Iterator[Batch], **more: Any) -> EvalResult:
        self.evaluations += 1

        def dying() -> Iterator[Batch]:
            for batch in batches:
                yield batch
                Orphan.gone = self.evaluations == self._evaluation

        return super().evaluate(dying(), **more)


@pytest.fixture(autouse=True)
def only_the_loop_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Orphan, "gone", False)
    monkeypatch.setattr(Launcher, "is_gone", lambda launcher: Orphan.gone)
    monkeypatch.setattr(Watchdog, "look", lambda watchdog: None)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return settings(tmp_path / "run")


@pytest.fixture
def whole(tmp_path: Path) -> list[dict[str, Any]]:
    never_stopped = settings(tmp_path / "whole")
    run(never_stopped)
    return lines(never_stopped)


def resumed(config: RunConfig) -> list[dict[str, Any]]:
    Orphan.gone = False
    run(change(config, "checkpoint", load=config.logging.run_dir))
    return lines(config)


def test_a_step_in_which_it_dies_is_given_up(config: RunConfig, whole: list[dict[str, Any]]) -> None:
    engine, diary = Orphan(step=6), Diary()
    run(config, diary, engine=engine)
    assert lines(config)[-1]["step"] == 5
    assert diary.events == ["start 0", "save 3", "valid 4", "save 5", "end"]
    assert resumed(config) == whole


@pytest.mark.parametrize("between", [1, 16])
@pytest.mark.parametrize(
    ("evaluation", "step"), [(1, 4), (3, 12), (4, 12)]
)  # the valid split, and the test split
def test_an_evaluation_in_which_it_dies_is_made_up_for(
    config: RunConfig,
    whole: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    between: int,
    evaluation: int,
    step: int,
) -> None:
    monkeypatch.setattr(metrics, "_BETWEEN_STOPS", between)
    engine = Orphan(evaluation=evaluation)
    run(config, engine=engine)
    assert engine.evaluations == evaluation and engine.batches_scored == min(between, 4)
    assert find(Path(config.logging.run_dir)) == Path(config.logging.run_dir) / "checkpoints" / folder_name(
        step
    )
    assert lines(config) == whole[: len(lines(config))] and len(lines(config)) == step + evaluation - 1
    assert resumed(config) == whole


def test_killed_between_the_save_of_a_stop_and_its_evaluation(
    config: RunConfig, whole: list[dict[str, Any]]
) -> None:
    class KilledInEvaluation(Diary):
        def on_evaluation(self, record: Record) -> None:
            raise Killed

    stops = change(config, "checkpoint", exit_interval=4)
    with pytest.raises(Killed):
        run(stops, KilledInEvaluation())
    # the diary is asked after metrics.jsonl: take its line away
    path = Path(config.logging.run_dir) / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert resumed(config) == whole


def test_an_evaluation_is_not_repeated(config: RunConfig, whole: list[dict[str, Any]]) -> None:
    stops = change(config, "checkpoint", exit_interval=4)
    run(stops)  # saves, and then evaluates
    assert resumed(config) == whole


def test_a_checkpoint_after_an_evaluation_owes_nothing(config: RunConfig, tmp_path: Path) -> None:
    run(change(config, "checkpoint", save_interval=4))
    elsewhere = settings(tmp_path / "elsewhere")
    torch.manual_seed(0)
    run(change(elsewhere, "checkpoint", load=config.logging.run_dir))
    assert lines(elsewhere) == []


def test_a_finetuning_owes_no_evaluation_of_the_run_that_it_starts_from(
    config: RunConfig, tmp_path: Path
) -> None:
    run(config, engine=Orphan(evaluation=1))  # its checkpoint says that an evaluation is due
    Orphan.gone = False
    tuned = settings(tmp_path / "tuned")
    run(change(tuned, "checkpoint", load=config.logging.run_dir, finetune=True))
    assert lines(tuned) and 0 not in [line["step"] for line in lines(tuned)]
