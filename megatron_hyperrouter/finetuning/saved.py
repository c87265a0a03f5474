"""What a fine-tuning saves for each seed: the weights that dev chose, and enough to continue after a stop.

``seed-N/checkpoints`` has the chosen weights, head included, as a checkpoint that ``mhr finetune --test``
takes.  ``seed-N/unfinished`` has the newest evaluation's full state until the seed is done.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.checkpoint.description import describe
from megatron_hyperrouter.checkpoint.folder import (
    CLASSIFIER,
    CheckpointFolders,
    find,
    read_manifest,
    verify,
)
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.train.resuming.run_meta import run_meta

if TYPE_CHECKING:
    from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer
    from megatron_hyperrouter.engines.shared import SharedEngine
    from megatron_hyperrouter.evaluate.trained import TrainedRun

COURSE = "finetuning"  # an entry of a manifest
_LINES = "training.jsonl"  # in a checkpoint that a fine-tuning continues from


@dataclass
class Course:
    """How far the fine-tuning with one seed has come."""

    step: int = 0
    chosen: int = 0  # the step that is best on dev; 0: none was evaluated
    best: tuple[float, float] = (-1.0, -math.inf)  # its accuracy, and its loss with the sign changed
    lines: list[str] = field(default_factory=list)  # of training.jsonl


@dataclass(frozen=True)
class SeedFolder:
    """The checkpoints of one seed; every method is called by all ranks together."""

    path: Path
    engine: SharedEngine
    begun: int  # steps of the run that the weights come from: those of the fine-tuning are counted on
    meta: Mapping[str, Any]
    texts: Mapping[str, bytes]

    def save(self, course: Course) -> None:
        """The state after a step, so that :meth:`load` continues; where dev has just chosen the step, its
        weights, too.
        """
        with self._own_remedy("free up space on that disk, and run the same command again to continue"):
            folders = self._folders("unfinished")
            if self.begun + course.step not in folders.steps():
                told = {"step": course.step, "chosen": course.chosen, "best": course.best}
                meta = dict(self.meta) | {COURSE: told}
                texts = dict(self.texts) | {_LINES: "".join(course.lines).encode()}
                folders.save(self.begun + course.step, self.engine.save, meta, texts=texts)
            self._keep_chosen(course)

    def _keep_chosen(self, course: Course) -> None:
        folders, write = self._folders("checkpoints"), partial(self.engine.save, weights_only=True)
        if course.chosen == course.step and self.begun + course.step not in folders.steps():
            folders.save(self.begun + course.step, write, self.meta, texts=self.texts)

    def load(self) -> Course:
        """Continue where an earlier attempt has stopped; a new course if there was none."""
        with self._own_remedy(f"remove {self.path} and run the same command again to restart this seed"):
            folder = find(self.path / "unfinished")
            if folder is None:
                if (
                    self.engine.place.is_main
                ):  # weights that an earlier attempt chose do not belong to this one
                    shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
                return Course()
            told = read_manifest(folder)["meta"][COURSE]
            verify(folder, self.engine)
            self.engine.load(folder)
        lines = (folder / _LINES).read_text(encoding="utf-8").splitlines(keepends=True)
        accuracy, loss = told["best"]
        course = Course(told["step"], told["chosen"], (accuracy, loss), lines)
        self._keep_chosen(course)  # the attempt may have ended between the two saves
        return course

    def take_chosen(self) -> None:
        """The model gets the weights that dev chose."""
        folder = find(self.path)
        if folder is None:
            raise CheckpointError(
                f"{self.path} no longer has the checkpoint with the best score on the dev split",
                remedy="choose another --output, or remove this folder to start again",
            )
        self.engine.load(folder, weights_only=True)

    def finish(self) -> None:
        """The seed is done: what would continue it is removed (main rank)."""
        shutil.rmtree(self.path / "unfinished", ignore_errors=True)

    @staticmethod
    @contextmanager
    def _own_remedy(remedy: str) -> Iterator[None]:
        """Replaces remedies of training, because they name flags that ``mhr finetune`` does not have."""
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(error.message, remedy=remedy) from error

    def _folders(self, name: str) -> CheckpointFolders:
        return CheckpointFolders(self.path / name, self.engine, keep=1)


def seed_folder(
    path: Path, engine: Any, run: TrainedRun, tokenizer: Tokenizer, about: Mapping[str, Any]
) -> SeedFolder:
    """``run``: the one that is fine-tuned, with its settings for that; ``about``: labels and seed."""
    described = describe(run.settings, tokenizer=tokenizer.identity())
    meta = run_meta(run.settings, engine) | described.meta
    meta |= {"finetuned_from": str(run.checkpoint), CLASSIFIER: dict(about)}
    return SeedFolder(path, engine, run.step, meta, described.texts)


def labels_of(meta: Mapping[str, Any]) -> list[str] | None:
    """The labels of a fine-tuned run, from its manifest; None of any other run."""
    return meta[CLASSIFIER]["labels"] if CLASSIFIER in meta else None


def seed_of(meta: Mapping[str, Any]) -> int:
    """The seed that a classifier was trained with, from its manifest."""
    return int(meta[CLASSIFIER]["seed"])
