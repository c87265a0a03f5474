"""Hooks: what a person, TensorBoard and Weights & Biases are told."""

from __future__ import annotations

import importlib
import io
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_hyperrouter.config.tree import LoggingConfig, RunConfig
from megatron_hyperrouter.engines.base import Place
from megatron_hyperrouter.errors import HostError
from megatron_hyperrouter.train.hooks import (
    ConsoleHook,
    MetricsHook,
    SettingsHook,
    TensorBoardHook,
    WandbHook,
    duration,
    hooks_for,
)

MAIN, OTHER = Place(0, 2, 0, 2), Place(1, 2, 1, 2)


def step_record(step: int, *, loss: float = 3.0) -> dict[str, float | int | str | None]:
    return {
        "step": step,
        "lm_loss": loss,
        "learning_rate": 0.001,
        "topk": 2,
        "step_time": 0.5,
        "tokens_per_second": 2000.0,
    }


VALID = {"step": 4, "split": "valid", "topk": 2, "lm_loss": 2.0, "perplexity": 7.389, "bits_per_byte": 1.25}


def config_with(tmp_path: Path, **logging: object) -> RunConfig:
    return replace(RunConfig(), logging=LoggingConfig(run_dir=str(tmp_path / "run"), **logging))  # type: ignore[arg-type]


class TestConsole:
    def lines(self, hook: ConsoleHook, screen: Console) -> list[str]:
        assert isinstance(screen.file, io.StringIO)
        return screen.file.getvalue().splitlines()

    def test_a_line_every_interval_and_at_the_end_with_means(self) -> None:
        screen = Console(file=io.StringIO(), width=40)
        hook = ConsoleHook(7, log_interval=3, screen=screen)
        hook.on_start(0)
        for step in range(1, 8):
            hook.on_step(step_record(step, loss=float(step)))
        hook.on_end()
        lines = self.lines(hook, screen)
        assert [line.split()[1] for line in lines] == ["3/7", "6/7", "7/7"]
        assert ["loss 2.0000" in lines[0], "loss 5.0000" in lines[1], "loss 7.0000" in lines[2]] == [True] * 3
        assert "lr 1.00e-03  k 2  2,000 tokens/s  2 s left" in lines[0]

    def test_speed_is_tokens_over_time_not_a_mean_of_speeds(self) -> None:
        screen = Console(file=io.StringIO(), width=200)
        hook = ConsoleHook(2, log_interval=2, screen=screen)
        hook.on_step({**step_record(1), "step_time": 3.0, "tokens_per_second": 100.0})
        hook.on_step({**step_record(2), "step_time": 1.0, "tokens_per_second": 300.0})
        assert "150 tokens/s" in self.lines(hook, screen)[0]  # 600 tokens in 4 s

    @pytest.mark.parametrize(
        ("waits", "said"),
        [((0.0, 0.0), None), ((0.004, 0.004), None), ((0.5, 0.5), "25%"), ((0.0, 0.04), "1%")],
    )
    def test_waiting_for_data_is_told_where_it_matters(
        self, waits: tuple[float, float], said: str | None
    ) -> None:
        screen = Console(file=io.StringIO(), width=200)
        hook = ConsoleHook(2, log_interval=2, screen=screen)
        for step, (wait, time) in enumerate(zip(waits, (1.0, 3.0), strict=True), start=1):
            hook.on_step({**step_record(step), "step_time": time, "data_time": wait})
        (line,) = self.lines(hook, screen)
        assert ("waiting" in line) == (said is not None)
        assert said is None or line.endswith(f"left  {said} of the time waiting for data")

    def test_evaluations_and_saves_have_their_lines(self) -> None:
        screen = Console(file=io.StringIO(), width=20)
        hook = ConsoleHook(7, log_interval=3, screen=screen)
        hook.on_evaluation(VALID)  # type: ignore[arg-type]
        hook.on_evaluation({**VALID, "bits_per_byte": None})  # type: ignore[arg-type]
        hook.on_save(4, Path("runs/[a]/step_0000004"))
        assert self.lines(hook, screen) == [
            "step 4  valid loss 2.0000, perplexity 7.39, 1.2500 bits per byte with k = 2",
            "step 4  valid loss 2.0000, perplexity 7.39 with k = 2",
            "step 4  saved runs/[a]/step_0000004",
        ]

    def test_a_terminal_gets_a_bar_and_no_lines(self) -> None:
        screen = Console(file=io.StringIO(), force_terminal=True, width=140)
        hook = ConsoleHook(4, log_interval=2, screen=screen)
        hook.on_start(1)
        for step in (2, 3, 4):
            hook.on_step(step_record(step))
        hook.on_end()
        hook.on_end()  # twice does no harm
        text = screen.file.getvalue()  # type: ignore[attr-defined]
        assert "4/4" in text and "tokens/s" in text and "step 2/4" not in text

    def test_a_lost_loss_does_not_break_the_line(self) -> None:
        screen = Console(file=io.StringIO())
        ConsoleHook(1, log_interval=1, screen=screen).on_step(step_record(1, loss=float("nan")))
        assert "loss nan" in screen.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (59.6, "1:00 min"), (125, "2:05 min"), (3723, "1:02:03 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class TestTensorBoard:
    def test_every_number_under_its_name(self, tmp_path: Path) -> None:
        hook = TensorBoardHook(tmp_path)
        hook.on_start(0)
        hook.on_step({**step_record(1), "router/entropy/1": 1.25})
        hook.on_evaluation({**VALID, "bits_per_byte": None})  # type: ignore[arg-type]
        hook.on_end()
        events = EventAccumulator(str(tmp_path)).Reload()
        tags = {"lm_loss", "learning_rate", "topk", "step_time", "tokens_per_second", "router/entropy/1"}
        assert set(events.Tags()["scalars"]) == tags | {"valid/topk", "valid/lm_loss", "valid/perplexity"}
        assert [(event.step, event.value) for event in events.Scalars("router/entropy/1")] == [(1, 1.25)]
        assert [(event.step, event.value) for event in events.Scalars("valid/lm_loss")] == [(4, 2.0)]

    def test_a_resumed_run_shows_no_step_twice(self, tmp_path: Path) -> None:
        for first, last in ((0, 4), (2, 5)):
            hook = TensorBoardHook(tmp_path)
            hook.on_start(first)
            for step in range(first + 1, last + 1):
                hook.on_step(step_record(step, loss=10.0 * first + step))
            hook.on_end()
        events = EventAccumulator(str(tmp_path)).Reload().Scalars("lm_loss")
        assert [(event.step, event.value) for event in events] == [
            (1, 1.0),
            (2, 2.0),
            (3, 23.0),
            (4, 24.0),
            (5, 25.0),
        ]


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
            hook.on_evaluation({**VALID, "bits_per_byte": None})  # type: ignore[arg-type]
            hook.on_end()
        assert [(init["project"], init["name"], init["id"], init["resume"]) for init in wandb.inits] == [
            ("routers", "run", None, None),
            ("routers", "run", "id1", "allow"),
            ("routers", "run", None, None),  # started afresh: a run of its own
        ]
        assert wandb.logged[0] == {**step_record(1)}
        assert wandb.logged[1] == {
            "step": 4,
            "valid/topk": 2,
            "valid/lm_loss": 2.0,
            "valid/perplexity": 7.389,
        }
        assert wandb.finished == 3

    @pytest.mark.parametrize("place", [MAIN, OTHER])
    def test_missing_library_is_told_on_every_rank(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: Place
    ) -> None:
        monkeypatch.setitem(
            sys.modules, "wandb", None
        )  # what Python itself notes for a module that must not be imported
        with pytest.raises(HostError, match="--wandb-project needs wandb") as caught:
            hooks_for(config_with(tmp_path, wandb_project="routers"), place)
        assert caught.value.exit_status == 5 and "pip install wandb" in caught.value.remedy


def test_missing_tensorboard_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(HostError, match="--tensorboard-dir needs tensorboard"):
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
        ConsoleHook,
        TensorBoardHook,
    ]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
