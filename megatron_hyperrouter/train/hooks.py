"""Watching a run: hooks that are called with what happened, on the main rank only.  Hooks cannot change or
end the run: one that fails is reported and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_hyperrouter import console
from megatron_hyperrouter.config.run_folder import write_settings
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import STOPPED, ConfigError, Problem
from megatron_hyperrouter.guard.events import EventsFile, Fact
from megatron_hyperrouter.guard.stopping import StopRequest
from megatron_hyperrouter.train.metrics import MetricsFile, Record

_STATUS = {"end": 0, "stop": STOPPED}  # exit statuses


class Hook:
    """Base class of all hooks; override the events that you need.  Steps count from 1."""

    essential = False  # True: the run is useless without this hook, so it saves and stops when the hook fails

    def on_start(self, step: int) -> None:
        """``step`` steps are done: 0 in a new run, more in a resumed one."""

    def on_step(self, record: Record) -> None:
        """A step was taken."""

    def on_evaluation(self, record: Record) -> None:
        """A split was scored."""

    def on_save(self, step: int, folder: Path) -> None:
        """A checkpoint is complete."""

    def on_return(self, step: int) -> None:
        """The run returned to a checkpoint: what was reported about later steps is no longer valid."""

    def on_event(self, event: str, step: int, **facts: Fact) -> None:
        """Something happened: ``save``, ``stop``, ``end``, ``failure``, ``bad_step``, ``alarm``."""

    def on_end(self) -> None:
        """The run ends, in whatever way; may come without :meth:`on_start`."""


class GuardedHook(Hook):
    """A hook that cannot end the run: a full disk, a closed terminal or an unreachable service only gives a
    warning.

    An essential hook that fails asks for a stop, so that the run saves; ``error`` is what to raise then.
    """

    def __init__(self, hook: Hook, request: StopRequest) -> None:
        self._hook, self._request = hook, request
        self._dropped = False
        self.error: Exception | None = None

    def on_start(self, step: int) -> None:
        """Nothing can be lost yet, so an essential hook may fail here."""
        if self._hook.essential:
            self._hook.on_start(step)
        else:
            self._call(lambda: self._hook.on_start(step))

    def on_step(self, record: Record) -> None:
        """Pass it on."""
        self._call(lambda: self._hook.on_step(record))

    def on_evaluation(self, record: Record) -> None:
        """Pass it on."""
        self._call(lambda: self._hook.on_evaluation(record))

    def on_save(self, step: int, folder: Path) -> None:
        """Pass it on."""
        self._call(lambda: self._hook.on_save(step, folder))

    def on_return(self, step: int) -> None:
        """Pass it on."""
        self._call(lambda: self._hook.on_return(step))

    def on_event(self, event: str, step: int, **facts: Fact) -> None:
        """Pass it on."""
        self._call(lambda: self._hook.on_event(event, step, **facts))

    def on_end(self) -> None:
        """Pass it on, even to a hook that has failed, which may have something to close."""
        self._dropped = False
        self._call(self._hook.on_end)

    def _call(self, tell: Callable[[], None]) -> None:
        if self._dropped:
            return
        try:
            tell()
        # rich raises SystemExit if the reader of its output is gone
        except (Exception, SystemExit) as error:  # noqa: BLE001 - reported here, or raised after a save
            self._dropped = True
            name = type(self._hook).__name__
            if not self._hook.essential:
                console.warn(f"{name} failed and is now switched off: {error or type(error).__name__}")
            elif self.error is None and isinstance(error, Exception):
                self.error = error
                self._request.ask(f"an error in {name}")


class SettingsHook(Hook):
    """Writes ``config.yaml`` once the run has begun, so that a refused ``--load`` does not change the
    settings of the run.
    """

    essential = True

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def on_start(self, step: int) -> None:
        """Write the settings."""
        try:
            write_settings(self._config)
        except OSError as error:
            rule = f"config.yaml cannot be written ({error.strerror})"
            remedy = "free up space on that disk, or choose another folder"
            raise ConfigError([Problem("--run-dir", self._config.logging.run_dir, rule, remedy)]) from error


class EventsHook(Hook):
    """Writes ``events.jsonl``."""

    def __init__(self, path: Path, opening: Mapping[str, Fact] | None = None) -> None:
        """``opening``: fields of the first event of an attempt."""
        self._file, self._opening = EventsFile(path), dict(opening or {})

    def on_start(self, step: int) -> None:
        """The run starts, or continues."""
        self._file.write("resume" if step else "start", step, **self._opening)

    def on_event(self, event: str, step: int, **facts: Fact) -> None:
        """Write one line; the last one of an attempt has the exit status."""
        if event in _STATUS:
            facts["status"] = _STATUS[event]
        self._file.write(event, step, **facts)


class MetricsHook(Hook):
    """Writes ``metrics.jsonl``."""

    essential = True

    def __init__(self, path: Path) -> None:
        self._file = MetricsFile(path)

    def on_start(self, step: int) -> None:
        """Remove the lines that a killed run wrote after its checkpoint, so that no step occurs twice."""
        self._file.cut_after(step)

    def on_return(self, step: int) -> None:
        """Remove the lines of later steps, so that no step occurs twice."""
        self._file.cut_after(step)

    def on_step(self, record: Record) -> None:
        """One line."""
        self._file.append(record)

    def on_evaluation(self, record: Record) -> None:
        """One line."""
        self._file.append(record)

    def on_save(self, step: int, folder: Path) -> None:
        """Lines up to a checkpoint are as durable as the checkpoint."""
        self._file.sync()

    def on_end(self) -> None:
        """Close the file."""
        self._file.close()
