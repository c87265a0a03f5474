"""Watching a run: hooks that are told what happened, on the main rank alone; none of them changes the
run.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from megatron_hyperrouter.config.cli import write_settings
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.base import Place
from megatron_hyperrouter.errors import HostError
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


class ConsoleHook(Hook):
    """Tells a person how far the run is: a live bar on a terminal, else a line every ``log_interval``
    steps.
    """

    def __init__(self, train_iters: int, *, log_interval: int, screen: Console | None = None) -> None:
        self._train_iters, self._log_interval = train_iters, log_interval
        self._screen = screen or Console()
        self._recent: deque[Record] = deque(maxlen=log_interval)
        self._progress: Progress | None = None

    def on_start(self, step: int) -> None:
        """Open the bar where somebody can see it move."""
        if not self._screen.is_terminal or step >= self._train_iters:
            return
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
        )
        self._progress = Progress(*columns, console=self._screen, transient=True)
        self._progress.add_task("", total=self._train_iters, completed=step)
        self._progress.start()

    def on_step(self, record: Record) -> None:
        """Move the bar, or print a line; loss and speed are means over the steps since the last line."""
        step = int(record["step"] or 0)
        self._recent.append(record)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, description=self._summary(step))
        if step % self._log_interval == 0 or step == self._train_iters:
            if self._progress is None:
                self._say(f"step {step}/{self._train_iters}  {self._summary(step)}")
            self._recent.clear()

    def on_evaluation(self, record: Record) -> None:
        """One line."""
        bits = "" if record["bits_per_byte"] is None else f", {record['bits_per_byte']:.4f} bits per byte"
        self._say(
            f"step {record['step']}  {record['split']} loss {record['lm_loss']:.4f}, perplexity "
            f"{record['perplexity']:.2f}{bits}"
            f" with k = {record['topk']}"
        )

    def on_save(self, step: int, folder: Path) -> None:
        """One line."""
        self._say(f"step {step}  saved {folder}")

    def on_end(self) -> None:
        """Close the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _say(self, text: str) -> None:
        self._screen.print(text, markup=False, highlight=False, soft_wrap=True)

    def _summary(self, step: int) -> str:
        last, count = self._recent[-1], len(self._recent)
        mean = {
            name: sum(float(record.get(name) or 0.0) for record in self._recent) / count
            for name in ("step_time", "data_time", "lm_loss")
        }
        speed = float(last["tokens_per_second"] or 0.0) * float(last["step_time"] or 0.0) / mean["step_time"]
        left = duration((self._train_iters - step) * mean["step_time"])
        waits = mean["data_time"] / mean["step_time"]
        late = f"  {waits:.0%} of the time waiting for data" if waits >= 0.01 else ""
        return (
            f"loss {mean['lm_loss']:.4f}  lr {last['learning_rate']:.2e}  k {last['topk']}  {speed:,.0f} "
            f"tokens/s  {left} left{late}"
        )


class TensorBoardHook(Hook):
    """Writes TensorBoard events; a resumed run hides the events after the step that it loaded."""

    def __init__(self, folder: Path) -> None:
        self._open = _tensorboard().SummaryWriter
        self._folder = folder
        self._writer: Any = None

    def on_start(self, step: int) -> None:
        """Open the event file."""
        self._writer = self._open(str(self._folder), purge_step=step + 1)

    def on_step(self, record: Record) -> None:
        """One scalar a number, under its own name."""
        self._add("", record)

    def on_evaluation(self, record: Record) -> None:
        """One scalar a number, under the name of the split: ``valid/lm_loss``."""
        self._add(f"{record['split']}/", record)

    def on_save(self, step: int, folder: Path) -> None:
        """Events up to a checkpoint are on disk."""
        self._writer.flush()

    def on_end(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()

    def _add(self, prefix: str, record: Record) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(prefix + name, value, record["step"])


class WandbHook(Hook):
    """Reports to Weights & Biases; a resumed run goes on under the id that ``wandb-id.txt`` in the run
    folder keeps.
    """

    def __init__(self, config: RunConfig) -> None:
        self._wandb = _wandb()
        self._config = config
        self._run: Any = None

    def on_start(self, step: int) -> None:
        """Open the run; ``WANDB_MODE=offline`` keeps it on this machine."""
        folder = Path(self._config.logging.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb-id.txt"
        known = id_file.read_text().strip() if step and id_file.exists() else None
        self._run = self._wandb.init(
            project=self._config.logging.wandb_project,
            name=folder.resolve().name,
            dir=str(folder),
            config=asdict(self._config),
            id=known,
            resume="allow" if known else None,
        )
        id_file.write_text(f"{self._run.id}\n")
        self._run.define_metric(
            "*", step_metric="step"
        )  # W&B's own step cannot go back, as a resumed run does

    def on_step(self, record: Record) -> None:
        """All numbers of the step."""
        self._run.log({"step": record["step"], **_numbers(record)})

    def on_evaluation(self, record: Record) -> None:
        """All numbers, under the name of the split: ``valid/lm_loss``."""
        self._run.log(
            {
                "step": record["step"],
                **{f"{record['split']}/{name}": value for name, value in _numbers(record).items()},
            }
        )

    def on_end(self) -> None:
        """Close the run."""
        if self._run is not None:
            self._run.finish()


def hooks_for(config: RunConfig, place: Place) -> list[Hook]:
    """The hooks that the settings ask for, on the main rank; none elsewhere.

    Raises HostError on every rank when a library is missing, so that no rank waits for one that has left.
    """
    asked: list[Callable[[], Hook]] = [
        lambda: SettingsHook(config),
        lambda: MetricsHook(Path(config.logging.run_dir) / "metrics.jsonl"),
        lambda: ConsoleHook(config.train.train_iters, log_interval=config.logging.log_interval),
    ]
    if config.logging.tensorboard_dir is not None:
        folder = Path(config.logging.tensorboard_dir)
        _tensorboard()
        asked.append(lambda: TensorBoardHook(folder))
    if config.logging.wandb_project is not None:
        _wandb()
        asked.append(lambda: WandbHook(config))
    return [make() for make in asked] if place.is_main else []


def duration(seconds: float) -> str:
    """``3 s``, ``2:05 min``, ``1:02:03 h``."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d} h"
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"


def _numbers(record: Record) -> dict[str, float | int]:
    return {
        name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)
    }


def _tensorboard() -> ModuleType:
    return _import("torch.utils.tensorboard", asked="--tensorboard-dir", package="tensorboard")


def _wandb() -> ModuleType:
    return _import("wandb", asked="--wandb-project", package="wandb")


def _import(module: str, *, asked: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise HostError(
            f"{asked} needs {package}, which cannot be imported: {error}", remedy=f"pip install {package}"
        ) from error
