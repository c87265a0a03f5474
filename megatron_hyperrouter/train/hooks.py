"""Watching a run: hooks that are told what happened, on the main rank alone; none of them changes the
run.
"""

from __future__ import annotations

from pathlib import Path

from megatron_hyperrouter.config.cli import write_settings
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.train.metrics import MetricsFile, Record


class Hook:
    """Base of all hooks; override what you want to see.  Steps count from 1."""

    def on_start(self, step: int) -> None:
        """``step`` steps are done: 0 in a new run, more in a resumed one."""

    def on_step(self, record: Record) -> None:
        """A step was taken."""

    def on_evaluation(self, record: Record) -> None:
        """A split was scored."""

    def on_save(self, step: int, folder: Path) -> None:
        """A checkpoint is complete."""

    def on_end(self) -> None:
        """The run ends, in whatever way; may come without :meth:`on_start`."""


class SettingsHook(Hook):
    """Writes ``config.yaml`` once the run has begun: a ``--load`` that was refused leaves the settings of
    the run as they were.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def on_start(self, step: int) -> None:
        """Write the settings."""
        write_settings(self._config)


class MetricsHook(Hook):
    """Writes ``metrics.jsonl``."""

    def __init__(self, path: Path) -> None:
        self._file = MetricsFile(path)

    def on_start(self, step: int) -> None:
        """No step may stand twice: what a killed run wrote after its checkpoint goes."""
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
