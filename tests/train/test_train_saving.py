"""When a run saves (by steps, by time, on request), what it does if a save fails, and that training does not
wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import FakeEngine, FakeStaged
from tiny_run import VOCAB_SIZE, settings, splits

from megatron_hyperrouter.checkpoint.folder import find
from megatron_hyperrouter.config.tree import CheckpointConfig, LoggingConfig, RunConfig
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.guard.stopping import StopRequest
from megatron_hyperrouter.train import saving
from megatron_hyperrouter.train.hooks import Hook
from megatron_hyperrouter.train.loop import train
from megatron_hyperrouter.train.saving import NOTHING, Saving, Wish


class Clock:
    """Minutes that pass when the test says so."""

    minutes = 0.0

    def __call__(self) -> float:
        return 60 * self.minutes


class Saves(Hook):
    """The steps that were saved, as a hook is told."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save(self, step: int, folder: Path) -> None:
        assert folder.name == f"step_{step:07d}" and (folder / "manifest.json").exists()
        self.steps.append(step)


def saving_of(root: Path, clock: Clock, engine: FakeEngine | None = None, **values: Any) -> SimpleNamespace:
    """A ``Saving``, its engine, and the steps that it has told of."""
    engine, steps = engine or FakeEngine(VOCAB_SIZE), []
    found = Saving(
        engine,
        RunConfig(checkpoint=CheckpointConfig(**values), logging=LoggingConfig(run_dir=str(root))),
        texts={},
        meta=lambda step: {"step": step},
        saved=lambda step, folder: steps.append(step),
        remedy=lambda: "go back",
        clock=clock,
    )
    return SimpleNamespace(saving=found, engine=engine, steps=steps)


def asks(run: SimpleNamespace) -> bool:
    """Whether the rank has something to tell the others, when no signal has come."""
    return bool(run.saving.asks(StopRequest()))


class TestByTheClock:
    @pytest.mark.parametrize(
        ("values", "minutes"),
        [
            ({}, 30),
            ({"save_interval": 100}, None),
            ({"save_interval_minutes": 5}, 5),
            ({"save_interval_minutes": 0}, None),
            ({"save_interval": 100, "save_interval_minutes": 7}, 7),
        ],
    )
    def test_how_long_a_run_goes_without_a_save(
        self, tmp_path: Path, values: dict[str, Any], minutes: float | None
    ) -> None:
        clock = Clock()
        run = saving_of(tmp_path, clock, **values)
        assert not asks(run)
        clock.minutes = 1000.0 if minutes is None else minutes - 0.1
        assert not asks(run)
        if minutes is None:
            return
        clock.minutes = minutes
        assert asks(run) and run.saving.answer(4, StopRequest()) == Wish("", save=True)
        run.saving.save(4, wait=True)
        assert not asks(run)  # counted from the last save
        clock.minutes += minutes
        assert asks(run)

    def test_another_rank_has_no_clock(self, tmp_path: Path) -> None:
        engine = FakeEngine(VOCAB_SIZE)
        engine.place = replace(engine.place, rank=1)
        clock = Clock()
        run = saving_of(tmp_path, clock, engine, exit_duration_in_mins=1e-9)
        clock.minutes = 1000.0
        assert not asks(run)

    def test_the_program_stops_after_its_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(saving, "_STARTED", -60.0)  # it read data for a minute
        clock = Clock()
        run = saving_of(tmp_path, clock, exit_duration_in_mins=3)
        clock.minutes = 1.9
        assert not asks(run)
        clock.minutes = 2.0
        assert asks(run)
        request = StopRequest()
        assert run.saving.asks(request) and request.came
        assert run.saving.answer(4, request) == Wish("--exit-duration-in-mins", save=False)

    def test_a_signal_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(saving, "_STARTED", -60.0)
        run, request = saving_of(tmp_path, Clock(), exit_duration_in_mins=1e-9), StopRequest()
        request.ask("SIGUSR1")
        assert run.saving.asks(request)
        assert run.saving.answer(4, request) == Wish("SIGUSR1", save=False)

    def test_nothing(self, tmp_path: Path) -> None:
        assert saving_of(tmp_path, Clock()).saving.answer(1, StopRequest()) == NOTHING


class Held(FakeEngine):
    """What it stages is written when the test says so; ``problems``: what the next writes raise."""

    def __init__(self) -> None:
        super().__init__(VOCAB_SIZE)
        self.go = threading.Event()
        self.problems: list[Exception] = []

    def stage(self) -> FakeStaged:
        staged = super().stage()
        return HeldState(staged.state, self)


class HeldState(FakeStaged):
    def __init__(self, state: dict[str, Any], engine: Held) -> None:
        super().__init__(state)
        self.engine = engine

    def write(self, folder: Path) -> list[Path]:
        assert self.engine.go.wait(20)
        if self.engine.problems:
            raise self.engine.problems.pop(0)
        return super().write(folder)


class TestBehindTheTraining:
    def test_it_saves_the_weights_of_the_step_that_asked(self, tmp_path: Path) -> None:
        engine = Held()
        run = saving_of(tmp_path, Clock(), engine)
        before = engine.table_VV.detach().clone()
        run.saving.save(1)
        engine.table_VV.data.add_(1.0)  # the next step
        run.saving.poll()
        assert run.steps == [] and find(tmp_path) is None
        engine.go.set()
        run.saving.settle(2)
        assert run.steps == [1]
        engine.load(tmp_path / "checkpoints/step_0000001")
        assert torch.equal(engine.table_VV.detach(), before)

    def test_without_it_a_save_waits(self, tmp_path: Path) -> None:
        run = saving_of(tmp_path, Clock(), async_save=False)
        run.saving.save(1)
        assert run.steps == [1] and find(tmp_path) == tmp_path / "checkpoints/step_0000001"

    def test_the_next_save_waits_for_the_last(self, tmp_path: Path) -> None:
        engine = Held()
        run = saving_of(tmp_path, Clock(), engine)
        run.saving.save(1)
        threading.Timer(0.2, engine.go.set).start()
        run.saving.save(2)
        assert run.steps == [1]
        run.saving.settle(2)
        assert run.steps == [1, 2]

    def test_a_step_is_saved_once(self, tmp_path: Path) -> None:
        run = saving_of(tmp_path, Clock())
        for _ in range(2):
            run.saving.save(3, wait=True)
        assert run.steps == [3]


FULL = OSError(28, "No space left on device")


class TestFailures:
    def failed(self, tmp_path: Path, *problems: Exception) -> SimpleNamespace:
        """A save of step 1 that fails behind the training."""
        engine = Held()
        engine.problems, run = list(problems), saving_of(tmp_path, Clock(), engine)
        run.saving.save(1)
        engine.go.set()
        while not asks(run):
            pass
        return run

    def test_one_more_attempt_at_the_step_where_the_run_is(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = self.failed(tmp_path, FULL)
        assert run.saving.answer(5, StopRequest()) == NOTHING
        assert run.steps == [5] and find(tmp_path) == tmp_path / "checkpoints/step_0000005"
        told = capsys.readouterr().err
        assert "step 1 could not be saved" in told and "No space left" in told and "saving step 5" in told
        run.saving.save(5, wait=True)  # it is there already
        assert run.steps == [5]

    def test_a_second_failure_ends_the_run(self, tmp_path: Path) -> None:
        run = self.failed(tmp_path, FULL, FULL)
        with pytest.raises(CheckpointError, match=r"step 5 could not be saved.*No space left") as caught:
            run.saving.answer(5, StopRequest())
        assert "free up space on that disk" in caught.value.remedy and find(tmp_path) is None

    def test_what_would_fail_again_is_not_tried_again(self, tmp_path: Path) -> None:
        run = self.failed(tmp_path, CheckpointError("w: its exp_avg contains NaN or infinity"))
        with pytest.raises(CheckpointError, match="step 1 was not saved: w: its exp_avg") as caught:
            run.saving.answer(5, StopRequest())
        assert caught.value.remedy == "go back" and run.engine.problems == []

    def test_the_next_save_is_the_attempt(self, tmp_path: Path) -> None:
        run = self.failed(tmp_path, FULL)
        run.saving.save(7)
        run.saving.settle(7)
        assert run.steps == [7]


def change(config: RunConfig, **values: object) -> RunConfig:
    return replace(config, checkpoint=replace(config.checkpoint, **values))


class TestInTheLoop:
    @pytest.fixture
    def go(self, tmp_path: Path) -> Callable[..., tuple[int, list[int]]]:
        def run(**values: object) -> tuple[int, list[int]]:
            saves = Saves()
            config = change(settings(tmp_path / "run"), **values)
            return train(FakeEngine(VOCAB_SIZE), config, splits(), [saves]), saves.steps

        return run

    def test_all_saves_of_a_run_behind_the_training(self, go: Callable[..., tuple[int, list[int]]]) -> None:
        assert go(async_save=True) == (12, [3, 6, 9, 12])

    def test_every_step_by_the_clock(self, go: Callable[..., tuple[int, list[int]]]) -> None:
        assert go(save_interval=0, save_interval_minutes=1e-9) == (12, list(range(1, 13)))

    def test_it_stops_saved_when_its_time_is_up(
        self, go: Callable[..., tuple[int, list[int]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert go(async_save=True, exit_duration_in_mins=1e-9) == (1, [1])
        assert f"stopped by --exit-duration-in-mins after step 1; continue with --load {tmp_path}" in (
            capsys.readouterr().out
        )

    def test_some_stay_for_good(self, go: Callable[..., tuple[int, list[int]]], tmp_path: Path) -> None:
        go(save_interval=1, keep_checkpoints=2, keep_every=4)
        found = sorted(int(path.name[-7:]) for path in (tmp_path / "run/checkpoints").glob("step_*"))
        assert found == [4, 8, 11, 12]
