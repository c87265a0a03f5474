"""Bad steps: how a run handles them, that they change nothing, and that a resumed run decides in the same
way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from fakes import FakeEngine, FakeStaged
from tiny_run import VOCAB_SIZE, settings, splits
from train.loop_runs import KillAt, Killed, change, lines, run

from megatron_hyperrouter.checkpoint.folder import CheckpointFolders
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.base import Batch, OwnPart, StepResult
from megatron_hyperrouter.errors import HyperRouterError
from megatron_hyperrouter.guard.bad_steps import BadSteps, attribution, steps_of
from megatron_hyperrouter.guard.events import read_events
from megatron_hyperrouter.train.hooks import EventsHook


class Faulty(FakeEngine):
    """Adds to the loss of some steps, counted from 1; ``once``: not when the step is run again."""

    def __init__(self, offsets: dict[int, float], *, once: bool = False) -> None:
        super().__init__(VOCAB_SIZE, topk_at=lambda step: 1 + step // 5)
        self._offsets, self._once = offsets, once

    def train_step(self, batches: Iterator[Batch], *, step: int, **more: Any) -> StepResult:
        self.loss_offset = self._offsets.get(step + 1, 0.0)
        return super().train_step(batches, step=step, **more)

    def again(self) -> tuple[StepResult, list[OwnPart]]:
        if self._once:
            self.loss_offset = 0.0
        return super().again()


def policy(config: RunConfig, name: str, **more: object) -> RunConfig:
    return change(config, "guard", on_bad_step=name, **more)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return settings(tmp_path / "run")


def trained(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if "skipped" not in record]


def test_skipping_is_naming_the_step_beforehand(config: RunConfig, tmp_path: Path) -> None:
    found = run(policy(config, "skip"), engine=Faulty({6: math.nan}))
    other = change(settings(tmp_path / "other"), "guard", skip_steps=("6",))
    named = run(other, engine=Faulty({}))
    assert torch.equal(found.table_VV, named.table_VV)
    assert trained(lines(config)) == trained(lines(other))
    skipped = [record for record in lines(config) + lines(other) if "skipped" in record]
    assert [(record["step"], record["lm_loss"], record["consumed_samples"]) for record in skipped] == [
        (6, None, 24),
        (6, None, 24),
    ]


def test_steps_that_are_named_no_more_are_not_skipped(config: RunConfig) -> None:
    """Steps that were found bad are still skipped."""
    named = policy(change(config, "checkpoint", exit_interval=6), "skip", skip_steps=("8-9",))
    run(named, engine=Faulty({5: math.nan}))
    again = change(named, "checkpoint", load=config.logging.run_dir, exit_interval=None)
    again = change(again, "guard", skip_steps=())
    run(again, engine=Faulty({}))
    assert [record["step"] for record in lines(config) if "skipped" in record] == [5]


def test_rolling_back_leaves_out_all_steps_since_the_checkpoint(config: RunConfig, tmp_path: Path) -> None:
    back = run(policy(config, "rollback"), engine=Faulty({5: math.inf}))
    other = change(settings(tmp_path / "other"), "guard", skip_steps=("4-5",))
    named = run(other, engine=Faulty({}))
    assert torch.equal(back.table_VV, named.table_VV)
    assert trained(lines(config)) == trained(lines(other))
    assert [record["step"] for record in lines(config) if "split" not in record] == list(range(1, 13))


class SlowToSave(Faulty):
    """Its checkpoints take a while to be written."""

    def stage(self) -> FakeStaged:
        staged = super().stage()
        return SlowStaged(staged.state)


class SlowStaged(FakeStaged):
    def write(self, folder: Path) -> list[Path]:
        time.sleep(0.2)
        return super().write(folder)


def test_rolling_back_to_a_checkpoint_that_is_being_written(config: RunConfig) -> None:
    config = change(policy(config, "rollback"), "checkpoint", async_save=True)
    run(config, engine=SlowToSave({4: math.nan}))
    assert [record["step"] for record in lines(config) if "skipped" in record] == [4]


class FailsToSave(FakeStaged):
    """Cannot be written the first time."""

    failures: ClassVar = [OSError("no space left on device")]

    def write(self, folder: Path) -> list[Path]:
        time.sleep(0.2)
        if self.failures:
            raise self.failures.pop()
        return super().write(folder)


def test_a_save_that_is_tried_again_at_a_bad_step_does_not_count_the_step(config: RunConfig) -> None:
    class Full(Faulty):
        def stage(self) -> FakeStaged:
            return FailsToSave(super().stage().state)

    with pytest.raises(HyperRouterError, match="continue from the checkpoint of step 4"):
        run(change(config, "checkpoint", async_save=True), engine=Full({5: math.nan}))


class SeesLess(Faulty):
    """Rank 0 is on another machine, which sees only the checkpoint of step 3."""

    def first_word(self, word: str) -> str:
        return "3" if word.isdecimal() else word


def test_rank_0_says_where_all_ranks_return_to(config: RunConfig) -> None:
    engine = run(policy(config, "rollback"), engine=SeesLess({8: math.nan}))
    assert engine.steps_taken == [*range(8), *range(8, 12)]
    assert [record["step"] for record in lines(config) if "skipped" in record] == [4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("once", "said"),
    [
        (False, "repeating the step gave the same result (lm_loss nan, grad_norm"),
        (True, "a temporary hardware fault is likely; seen on rank 0 (here, cpu)"),
    ],
)
def test_stopping_says_whether_the_value_repeats(config: RunConfig, once: bool, said: str) -> None:
    events = EventsHook(Path(config.logging.run_dir) / "events.jsonl")
    with pytest.raises(HyperRouterError, match="step 6: lm_loss is nan") as caught:
        run(config, events, engine=Faulty({6: math.nan}, once=once))
    assert said in caught.value.message and caught.value.exit_status == 1
    told = read_events(Path(config.logging.run_dir) / "events.jsonl")
    assert [(event["event"], event["step"]) for event in told[-2:]] == [("bad_step", 6), ("failure", 5)]
    assert told[-2]["reason"] == "lm_loss is nan" and said in str(told[-2]["attribution"])


def test_a_spike_is_bad_where_it_is_asked_for(config: RunConfig) -> None:
    watched = policy(config, "skip", max_loss_sigma=6.0, loss_window=6)
    run(watched, engine=Faulty({9: 50.0}))
    assert [record["step"] for record in lines(config) if "skipped" in record] == [9]
    run(change(config, "guard", on_bad_step="skip"), engine=Faulty({9: 50.0}))
    assert not [record for record in lines(config) if "skipped" in record]


@pytest.mark.parametrize("step", [5, 8, 10])
def test_a_resumed_run_decides_as_the_run_that_was_never_stopped(
    config: RunConfig, tmp_path: Path, step: int
) -> None:
    faults = {7: math.nan, 9: 50.0}
    more: dict[str, Any] = {"max_loss_sigma": 6.0, "loss_window": 6}
    whole = policy(settings(tmp_path / "whole"), "skip", **more)
    expected = run(whole, engine=Faulty(faults))
    killed = policy(config, "skip", **more)
    with pytest.raises(Killed):
        run(killed, KillAt(step), engine=Faulty(faults))
    again = change(killed, "checkpoint", load=config.logging.run_dir)
    found = run(again, engine=Faulty(faults))
    assert lines(config) == lines(whole) and torch.equal(found.table_VV, expected.table_VV)


def test_too_many_bad_steps_in_a_row_stop_the_run(config: RunConfig) -> None:
    with pytest.raises(HyperRouterError, match="bad steps in a row: 10"):
        run(policy(config, "skip"), engine=Faulty(dict.fromkeys(range(2, 13), math.nan)))


class TestJudgement:
    def result(self, loss: float, norm: float = 1.0) -> StepResult:
        return StepResult(loss, 1.0, 0.0, norm, {}, stop=False, peak_memory=0)

    def test_window(self) -> None:
        bad = BadSteps("skip", sigma=3.0, window=4)
        assert all(bad.accept(self.result(loss)) for loss in (9.0, 1.0, 2.0, 3.0, 2.0))  # 9 has left
        assert bad.accept(self.result(2.0 + 2.9 * math.sqrt(0.5)))
        bad.restore({"good": [[1.0, 1.0], [2.0, 1.0], [3.0, 1.0], [2.0, 1.0]], "skipped": [], "in_a_row": 0})
        assert not bad.accept(self.result(2.0 + 3.1 * math.sqrt(0.5)))
        assert not bad.accept(self.result(2.0, norm=1.1))  # a norm that never varied

    def test_state_comes_back(self) -> None:
        one = BadSteps("skip", sigma=3.0, window=4)
        for loss in (0.1, 0.2, 0.7):
            one.accept(self.result(loss, loss / 3))
        one.leave_out([4])
        other = BadSteps("skip", sigma=3.0, window=4)
        other.restore(one.state())
        assert other.state() == one.state() and not other.takes_part(4)

    def test_steps_of(self) -> None:
        assert list(steps_of(("105-107", "300"), last=400)) == [105, 106, 107, 300]
        assert list(steps_of(("105-99999999999", "300"), last=107)) == [105, 106, 107]

    @pytest.mark.parametrize(
        ("second", "repeats"), [(5.0, True), (5.004, True), (5.5, False), (math.nan, False)]
    )
    def test_attribution(self, second: float, repeats: bool) -> None:
        parts = [
            OwnPart(0, "a", "cuda:0", (2.0, 2.0), ""),
            OwnPart(1, "b", "cuda:1", (3.0, 3.0 if repeats else 4.0), ""),
        ]
        said = attribution(self.result(5.0), self.result(second), parts)
        assert ("gave the same" in said) == repeats
        assert ("seen on rank 1 (b, cuda:1)" in said) != repeats


class Collapsing(FakeEngine):
    """From step 61 on one expert gets more and more."""

    def train_step(self, batches: Iterator[Batch], *, step: int, **more: Any) -> StepResult:
        result = super().train_step(batches, step=step, **more)
        load = 1.8 + 0.01 * (step % 3) + (2.0 if step >= 60 else 0.0)
        return replace(result, layers={**result.layers, "load_max_over_mean": (1.5, load)})


def long(config: RunConfig, alarm: str) -> RunConfig:
    quick = change(config, "train", train_iters=80, eval_interval=0)
    quick = change(change(quick, "guard", alarm=(alarm,)), "model", moe_aux_loss_coeff=0.01)
    return change(change(quick, "optimizer", lr_warmup_iters=3), "checkpoint", save_interval=0)


class TestAlarms:
    def start(self, config: RunConfig) -> tuple[Collapsing, list[dict[str, Any]]]:
        engine = Collapsing(VOCAB_SIZE)
        path = Path(config.logging.run_dir) / "events.jsonl"
        try:
            run(config, EventsHook(path), engine=engine, data=splits(320))
        finally:
            self.events = [event for event in read_events(path) if event["event"] in ("alarm", "save")]
        return engine, self.events

    def test_an_alarm_is_an_event_that_says_all(self, config: RunConfig) -> None:
        _, events = self.start(long(config, "imbalance=note"))
        alarm, save = events
        assert (alarm["step"], alarm["alarm"], alarm["layer"], alarm["since"]) == (63, "imbalance", 2, 61)
        assert alarm["action"] == "note" and alarm["value"] > alarm["threshold"] > 1.8
        assert (save["event"], save["step"]) == ("save", 80)

    def test_snapshot(self, config: RunConfig) -> None:
        _, events = self.start(long(config, "imbalance=snapshot"))
        assert [(event["event"], event["step"]) for event in events] == [
            ("alarm", 63),
            ("save", 63),
            ("save", 80),
        ]

    def test_steps_left_out_after_an_alarm_are_no_alarms(self, config: RunConfig) -> None:
        watched = change(long(config, "imbalance=snapshot"), "guard", skip_steps=("64-66",))
        _, events = self.start(watched)
        assert [event["step"] for event in events if event["event"] == "save"] == [63, 80]

    @pytest.mark.parametrize("action", ["note", "snapshot"])
    @pytest.mark.parametrize("in_the_background", [False, True])
    def test_the_checkpoint_before_an_alarm_stays(
        self, config: RunConfig, action: str, in_the_background: bool
    ) -> None:
        saving = {"save_interval": 5, "keep_checkpoints": 1, "async_save": in_the_background}
        engine, _ = self.start(change(long(config, f"imbalance={action}"), "checkpoint", **saving))
        folders = CheckpointFolders(Path(config.logging.run_dir) / "checkpoints", engine)
        # 55: step 61 shows the first bad load, so the weights after 60 steps may be bad already
        assert set(folders.steps()) >= {55, 80} | ({63} if action == "snapshot" else set())
        assert not {50, 65, 70} & set(folders.steps())

    def test_a_snapshot_whose_save_is_tried_again_stays(self, config: RunConfig) -> None:
        class Full(Collapsing):
            saves = 0

            def stage(self) -> FakeStaged:
                self.saves += 1
                return Unwritable({}) if self.saves == 13 else super().stage()  # after 5, 10, ..., 60

        class Unwritable(FakeStaged):
            def write(self, folder: Path) -> list[Path]:
                raise OSError("no space left on device")

        saving = {"save_interval": 5, "keep_checkpoints": 1, "async_save": True}
        config, engine = change(long(config, "imbalance=snapshot"), "checkpoint", **saving), Full(VOCAB_SIZE)
        run(config, engine=engine, data=splits(320))
        steps = CheckpointFolders(Path(config.logging.run_dir) / "checkpoints", engine).steps()
        assert any(63 < step <= 65 for step in steps) and 63 not in steps

    def test_raise_aux_is_part_of_the_checkpoint(self, config: RunConfig) -> None:
        raising = long(config, "imbalance=raise-aux")
        engine, _ = self.start(raising)
        assert engine.aux_loss_coeffs == [0.02]
        again = change(change(raising, "checkpoint", load=config.logging.run_dir), "train", train_iters=81)
        resumed = Collapsing(VOCAB_SIZE)
        run(again, engine=resumed, data=splits(324))
        assert resumed.aux_loss_coeffs == [0.02]

    def test_experts_that_grow_alike(self, config: RunConfig) -> None:
        engine = FakeEngine(VOCAB_SIZE)
        engine.similarities = [{1: 0.3, 2: 0.2}, {1: 0.31, 2: 0.2}, {1: 0.3, 2: 0.6}, {1: 0.3, 2: 0.95}]
        watched = change(long(config, "collapse=snapshot"), "guard", expert_similarity_interval=20)
        path = Path(config.logging.run_dir) / "events.jsonl"
        run(watched, EventsHook(path), engine=engine, data=splits(320))
        alarm, *saves = (event for event in read_events(path) if event["event"] in ("alarm", "save"))
        told = {name: alarm[name] for name in ("step", "alarm", "layer", "value", "threshold", "since")}
        assert told == {
            "step": 80, "alarm": "collapse", "layer": 2, "value": 0.95, "threshold": 0.51, "since": 80
        }  # fmt: skip
        assert [save["step"] for save in saves] == [80]
        recorded = [line for line in lines(config) if "router/similarity/2" in line]
        assert [(line["step"], line["router/similarity/2"]) for line in recorded] == [
            (20, 0.2), (40, 0.2), (60, 0.6), (80, 0.95)
        ]  # fmt: skip

    def test_stop_saves_first(self, config: RunConfig) -> None:
        with pytest.raises(HyperRouterError, match="step 63: an alarm stopped the run"):
            self.start(long(config, "imbalance=stop"))
        assert [(event["event"], event["step"]) for event in self.events] == [("alarm", 63), ("save", 63)]
