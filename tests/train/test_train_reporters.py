"""Which hooks a run has, and what they send to TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train.records import VALID, step_record

from megatron_hyperrouter.config.tree import LoggingConfig, RunConfig
from megatron_hyperrouter.engines.base import RankPlace
from megatron_hyperrouter.errors import HostError
from megatron_hyperrouter.train.hooks import EventsHook, MetricsHook, SettingsHook
from megatron_hyperrouter.train.reporters import TensorBoardHook, WandbHook, hooks_for
from megatron_hyperrouter.train.screen import ConsoleHook

MAIN, OTHER = RankPlace(0, 2, 0, 2), RankPlace(1, 2, 1, 2)


def config_with(tmp_path: Path, **logging: object) -> RunConfig:
    return replace(RunConfig(), logging=LoggingConfig(run_dir=str(tmp_path / "run"), **logging))  # type: ignore[arg-type]


class TestTensorBoard:
    def test_every_number_in_its_group(self, tmp_path: Path) -> None:
        hook = TensorBoardHook(tmp_path)
        hook.on_start(0)
        hook.on_step(step_record(1, **{"router/entropy/1": 1.25}))
        hook.on_evaluation({**VALID, "bits_per_byte": None})
        hook.on_end()
        events = EventAccumulator(str(tmp_path)).Reload()
        assert set(events.Tags()["scalars"]) == {
            *("train/lm_loss", "train/learning_rate", "train/topk"),
            *("speed/step_time", "speed/tokens_per_second"),
            "router/entropy/1",
            *("eval/valid/topk", "eval/valid/lm_loss", "eval/valid/perplexity"),
        }
        assert [(event.step, event.value) for event in events.Scalars("router/entropy/1")] == [(1, 1.25)]
        assert [(event.step, event.value) for event in events.Scalars("eval/valid/lm_loss")] == [(4, 2.0)]

    def test_a_resumed_run_shows_no_step_twice(self, tmp_path: Path) -> None:
        for first, last in ((0, 4), (2, 5)):
            hook = TensorBoardHook(tmp_path)
            hook.on_start(first)
            for step in range(first + 1, last + 1):
                hook.on_step(step_record(step, loss=10.0 * first + step))
            hook.on_end()
        events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/lm_loss")
        assert [(event.step, event.value) for event in events] == [
            (1, 1.0),
            (2, 2.0),
            (3, 23.0),
            (4, 24.0),
            (5, 25.0),
        ]

    def test_a_run_that_goes_back_shows_no_step_twice(self, tmp_path: Path) -> None:
        hook = TensorBoardHook(tmp_path)
        hook.on_start(0)
        for step in (1, 2, 3):
            hook.on_step(step_record(step, loss=1.0))
        hook.on_return(1)
        hook.on_step(step_record(3, loss=2.0))
        hook.on_end()
        events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/lm_loss")
        assert [(event.step, event.value) for event in events] == [(1, 1.0), (3, 2.0)]


class FakeWandb(ModuleType):
    """Notes what the hook asks of the library."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, object]] = []
        self.logged: list[dict[str, object]] = []
        self.finished = 0

    def init(self, **options: object) -> SimpleNamespace:
        self.inits.append(options)
        return SimpleNamespace(
            id=options["id"] or f"id{len(self.inits)}",
            define_metric=lambda name, *, step_metric: None,
            log=self.logged.append,
            finish=lambda: setattr(self, "finished", self.finished + 1),
        )


class TestWandb:
    @pytest.fixture
    def wandb(self, monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
        fake = FakeWandb()
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    def test_reports_and_goes_on_under_its_id(self, wandb: FakeWandb, tmp_path: Path) -> None:
        config = config_with(tmp_path, wandb_project="routers")
        for first in (0, 3, 0):
            hook = WandbHook(config)
            hook.on_start(first)
            hook.on_step(step_record(first + 1))
            hook.on_evaluation({**VALID, "bits_per_byte": None})
            hook.on_end()
        assert [(init["project"], init["name"], init["id"], init["resume"]) for init in wandb.inits] == [
            ("routers", "run", None, None),
            ("routers", "run", "id1", "allow"),
            ("routers", "run", None, None),  # started afresh: a run of its own
        ]
        assert wandb.logged[0] == {
            "step": 1,
            "train/lm_loss": 3.0,
            "train/learning_rate": 0.001,
            "train/topk": 2,
            "speed/step_time": 0.5,
            "speed/tokens_per_second": 2000.0,
        }
        assert wandb.logged[1] == {
            "step": 4,
            "eval/valid/topk": 2,
            "eval/valid/lm_loss": 2.0,
            "eval/valid/perplexity": 7.389,
        }
        assert wandb.finished == 3

    def test_the_name_that_is_given(self, wandb: FakeWandb, tmp_path: Path) -> None:
        WandbHook(config_with(tmp_path, wandb_project="routers", wandb_exp_name="first try")).on_start(0)
        assert wandb.inits[0]["name"] == "first try"

    def test_an_empty_project_is_none(self, wandb: FakeWandb, tmp_path: Path) -> None:
        """Megatron-LM's default is an empty text."""
        assert not any(
            isinstance(hook, WandbHook) for hook in hooks_for(config_with(tmp_path, wandb_project=""), MAIN)
        )

    @pytest.mark.parametrize("place", [MAIN, OTHER])
    def test_missing_library_is_told_on_every_rank(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: RankPlace
    ) -> None:
        # what Python itself notes for a module that must not be imported
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(HostError, match="--wandb-project needs the wandb library") as caught:
            hooks_for(config_with(tmp_path, wandb_project="routers"), place)
        assert caught.value.exit_status == 5 and "pip install wandb" in caught.value.remedy


def test_missing_tensorboard_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(HostError, match="--tensorboard-dir needs the tensorboard library"):
        hooks_for(config_with(tmp_path, tensorboard_dir=str(tmp_path)), MAIN)
    monkeypatch.undo()
    importlib.import_module("torch.utils.tensorboard")


def test_only_the_main_rank_has_hooks(tmp_path: Path) -> None:
    config = config_with(tmp_path, tensorboard_dir=str(tmp_path / "events"))
    assert hooks_for(config, OTHER) == []
    assert not (tmp_path / "run").exists()
    assert [type(hook) for hook in hooks_for(config, MAIN)] == [
        SettingsHook,
        MetricsHook,
        EventsHook,
        ConsoleHook,
        TensorBoardHook,
    ]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
