"""Which hooks a run has, and those that report to TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.base import RankPlace
from megatron_hyperrouter.errors import HostError
from megatron_hyperrouter.guard.events import Fact
from megatron_hyperrouter.train.hooks import EventsHook, Hook, MetricsHook, SettingsHook
from megatron_hyperrouter.train.metrics import Record, tags
from megatron_hyperrouter.train.screen import ConsoleHook
from megatron_hyperrouter.train.written import SampleWriter

if TYPE_CHECKING:
    from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer


class TensorBoardHook(Hook):
    """Writes TensorBoard events; a run that resumes or goes back hides the events after that step."""

    def __init__(self, folder: Path) -> None:
        self._open = _tensorboard().SummaryWriter
        self._folder = folder
        self._writer: Any = None

    def on_start(self, step: int) -> None:
        """Open the event file."""
        self._writer = self._open(str(self._folder), purge_step=step + 1)

    def on_step(self, record: Record) -> None:
        """One scalar for each number, in groups (see :func:`metrics.tags`)."""
        for tag, value in tags(record).items():
            self._writer.add_scalar(tag, value, record["step"])

    def on_evaluation(self, record: Record) -> None:
        """One scalar for each number: ``eval/valid/lm_loss``."""
        self.on_step(record)

    def on_return(self, step: int) -> None:
        """Continue in a new event file, which hides the later events."""
        self._writer.close()
        self.on_start(step)

    def on_save(self, step: int, folder: Path) -> None:
        """Events up to a checkpoint are on disk."""
        self._writer.flush()

    def on_end(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class WandbHook(Hook):
    """Reports to Weights & Biases; a resumed run continues under the id in ``wandb-id.txt`` of its folder."""

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
            name=self._config.logging.wandb_exp_name or folder.resolve().name,
            dir=str(folder),
            config=asdict(self._config),
            id=known,
            resume="allow" if known else None,
        )
        id_file.write_text(f"{self._run.id}\n")
        # W&B's own step cannot go back, as a resumed run does
        self._run.define_metric("*", step_metric="step")

    def on_step(self, record: Record) -> None:
        """All numbers of the step, under the names of :func:`metrics.tags`."""
        self._run.log({"step": record["step"], **tags(record)})

    def on_evaluation(self, record: Record) -> None:
        """All numbers: ``eval/valid/lm_loss``."""
        self.on_step(record)

    def on_end(self) -> None:
        """Close the run."""
        if self._run is not None:
            self._run.finish()


def hooks_for(config: RunConfig, place: RankPlace, opening: Mapping[str, Fact] | None = None) -> list[Hook]:
    """The hooks that the settings need, on the main rank; none elsewhere.

    ``opening``: fields of the first event of this attempt.

    Raises HostError on every rank if a library is missing, so that no rank waits for one that has ended.
    """
    asked: list[Callable[[], Hook]] = [
        lambda: SettingsHook(config),
        lambda: MetricsHook(Path(config.logging.run_dir) / "metrics.jsonl"),
        lambda: EventsHook(Path(config.logging.run_dir) / "events.jsonl", opening),
        lambda: ConsoleHook(config.train.train_iters, log_interval=config.logging.log_interval),
    ]
    if config.logging.tensorboard_dir is not None:
        folder = Path(config.logging.tensorboard_dir)
        _tensorboard()
        asked.append(lambda: TensorBoardHook(folder))
    if config.logging.wandb_project:  # "" turns it off, as in Megatron-LM
        _wandb()
        asked.append(lambda: WandbHook(config))
    return [make() for make in asked] if place.is_main else []


def _tensorboard() -> ModuleType:
    return _import("torch.utils.tensorboard", asked="--tensorboard-dir", package="tensorboard")


def _wandb() -> ModuleType:
    return _import("wandb", asked="--wandb-project", package="wandb")


def _import(module: str, *, asked: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise HostError(
            (f"{asked} needs the {package} library, but this library cannot be imported ({error})"),
            remedy=f"run: pip install {package}",
        ) from error


def writer_of(config: RunConfig, tokenizer: Tokenizer) -> SampleWriter | None:
    """The writer that the settings ask for; None if they ask for none."""
    settings, length = config.logging, config.model.seq_length
    if not settings.sample_interval:
        return None
    # a long prompt leaves room for one token at least
    ids = [tokenizer.encode(prompt)[: length - 1] for prompt in settings.sample_prompt]
    return SampleWriter(
        every=settings.sample_interval,
        prompts=settings.sample_prompt,
        ids=[prompt or [tokenizer.eod] for prompt in ids],
        decode=tokenizer.decode,
        vocab_size=tokenizer.vocab_size,
        length=length,
    )
