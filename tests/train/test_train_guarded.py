"""Monitoring cannot end a run: a hook that fails, a terminal that has gone, a file with a needed name."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from fakes import FakeEngine
from rich.console import Console
from tiny_run import VOCAB_SIZE, settings, splits
from train.loop_runs import change, run

from megatron_hyperrouter.checkpoint.folder import find, folder_name
from megatron_hyperrouter.config.run_folder import make_folders
from megatron_hyperrouter.errors import ConfigError, HyperRouterError
from megatron_hyperrouter.guard.events import read_events
from megatron_hyperrouter.train.hooks import EventsHook, Hook, MetricsHook, SettingsHook
from megatron_hyperrouter.train.loop import train
from megatron_hyperrouter.train.metrics import Record
from megatron_hyperrouter.train.screen import ConsoleHook


class Failing(Hook):
    """Fails at step 3, as a service that goes away."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.ended = False

    def on_step(self, record: Record) -> None:
        self.steps.append(int(record["step"] or 0))
        if record["step"] == 3:
            raise ConnectionError("the service has gone")

    def on_end(self) -> None:
        self.ended = True


class Gone(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def engine() -> FakeEngine:
    return FakeEngine(VOCAB_SIZE)


def test_a_hook_that_fails_is_dropped_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hook = Failing()
    assert train(engine(), settings(tmp_path / "run"), splits(), [hook]) == 12
    assert hook.steps == [1, 2, 3] and hook.ended
    assert capsys.readouterr().err.count("Failing failed and is now switched off: the service has gone") == 1


@pytest.mark.parametrize("stream", [Gone(), open("/dev/full", "w")])  # noqa: SIM115
def test_a_screen_that_has_gone_changes_nothing(tmp_path: Path, stream: io.TextIOBase) -> None:
    hook = ConsoleHook(12, log_interval=1, screen=Console(file=stream))  # type: ignore[arg-type]
    config = settings(tmp_path / "run")
    run(config, hook)
    assert find(tmp_path / "run") == tmp_path / "run" / "checkpoints" / folder_name(12)


def test_metrics_that_cannot_be_written_stop_the_run_after_a_save(tmp_path: Path) -> None:
    class FullAtFive(MetricsHook):
        def on_step(self, record: Record) -> None:
            if record["step"] == 5:
                raise HyperRouterError("metrics.jsonl cannot be written")
            super().on_step(record)

    hook = FullAtFive(tmp_path / "run" / "metrics.jsonl")
    with pytest.raises(HyperRouterError, match=r"metrics\.jsonl cannot be written"):
        train(engine(), settings(tmp_path / "run"), splits(), [hook])
    assert find(tmp_path / "run") == tmp_path / "run" / "checkpoints" / folder_name(6)


def test_events_of_a_run_that_fails_and_of_one_that_continues(tmp_path: Path) -> None:
    class Broken(FakeEngine):
        def train_step(self, *args: object, step: int, **more: object) -> object:  # type: ignore[override]
            if step == 4:
                raise RuntimeError("a kernel failed")
            return super().train_step(*args, step=step, **more)  # type: ignore[arg-type]

    config = settings(tmp_path / "run")
    path = tmp_path / "run" / "events.jsonl"
    with pytest.raises(RuntimeError, match="a kernel failed"):
        train(Broken(VOCAB_SIZE), config, splits(), [EventsHook(path)])  # type: ignore[arg-type]
    again = change(config, "checkpoint", load=str(tmp_path / "run"))
    train(engine(), again, splits(), [EventsHook(path)])
    events = read_events(path)
    assert [(event["event"], event["step"], event["attempt"]) for event in events] == [
        *[("start", 0, 1), ("save", 3, 1), ("failure", 4, 1)],
        *[("resume", 3, 2), ("save", 6, 2), ("save", 9, 2), ("save", 12, 2), ("end", 12, 2)],
    ]
    assert events[2]["error"] == "RuntimeError" and events[2]["message"] == "a kernel failed"


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "events.jsonl", "checkpoints"])
def test_what_is_in_the_way_is_found_at_the_start(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    if name == "checkpoints":
        (folder / name).write_text("no folder")
    else:
        (folder / name).mkdir()
    with pytest.raises(ConfigError, match=rf"run/{name}(/\w+)? cannot be written") as caught:
        make_folders(settings(folder))
    assert "--run-dir" in str(caught.value)


def test_settings_that_cannot_be_written_are_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(config: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_hyperrouter.train.hooks.write_settings", full)
    config = settings(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be written .No space left on device"):
        train(engine(), config, splits(), [SettingsHook(config)])
