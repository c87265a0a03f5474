"""Fine-tuning with one seed: training, selection on dev, and the test.

Legend: ``N`` texts of a split, ``C`` classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_hyperrouter.errors import HyperRouterError
from megatron_hyperrouter.finetuning.batches import Feed, TextsOfSplit
from megatron_hyperrouter.finetuning.measures import Floats, scores
from megatron_hyperrouter.finetuning.weights import Kept, keep, start_again
from megatron_hyperrouter.model.classifier import Classifier
from megatron_hyperrouter.model.loss import ClassLoss
from megatron_hyperrouter.train.lr import learning_rate_at

if TYPE_CHECKING:
    from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer
    from megatron_hyperrouter.engines.base import StepResult
    from megatron_hyperrouter.engines.shared import SharedEngine
    from megatron_hyperrouter.evaluate.trained import TrainedRun
    from megatron_hyperrouter.finetuning.saved import SeedFolder
    from megatron_hyperrouter.finetuning.settings import Settings

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Outcome:
    """The result of one seed: the logits ``_NC`` of dev and test at each k, from the weights that dev
    chose.
    """

    seed: int
    chosen_step: int
    logits: dict[tuple[str, int], Floats] = field(default_factory=dict)  # (split, k)
    lines: list[str] = field(default_factory=list)  # of training.jsonl


@dataclass(frozen=True)
class Session:
    """A model with a head, and the splits of a task; every method is called by all ranks together."""

    engine: SharedEngine
    parts: dict[str, TextsOfSplit]
    begun: int  # steps of the run that the weights come from
    evaluations: int
    stop: Callable[[], bool]  # whether this rank was asked to stop
    start: Kept | None  # the run's weights; None for a test

    def run(self, seed: int, topks: Sequence[int], folder: SeedFolder, tell: Tell) -> Outcome | None:
        """Train with this seed, take the weights that are best on dev, and predict at each k; None if the
        fine-tuning was asked to stop.

        An attempt that was stopped continues from ``folder``.
        """
        assert self.start is not None, "the session was opened for a test"
        start_again(self.engine, self.start, seed=seed)
        course = folder.load()
        topk = self.engine.topk_at(self.begun)
        while course.step < self.engine.config.train.train_iters:
            result = self._step(course.step + 1, seed)
            course.step += 1
            record: dict[str, Any] = {"seed": seed, "step": course.step, "loss": result.lm_loss}
            record |= {"grad_norm": result.grad_norm, "aux_loss": result.aux_loss}
            evaluates = self._evaluates(course.step)
            if evaluates:
                found = scores(self.predictions("dev", topk), self.parts["dev"].classes_N)
                record |= {"dev_accuracy": found.accuracy, "dev_loss": found.loss}
                if (found.accuracy, -found.loss) > course.best:
                    course.best, course.chosen = (found.accuracy, -found.loss), course.step
            course.lines.append(json.dumps(record) + "\n")
            tell(record)
            if evaluates or result.stop:
                folder.save(course)
            if result.stop:
                return None
        folder.take_chosen()
        return Outcome(seed, course.chosen, self.tested(topks), course.lines)

    def tested(self, topks: Sequence[int]) -> dict[tuple[str, int], Floats]:
        """The logits of dev and test at each k, from the present weights."""
        return {(part, k): self.predictions(part, k) for part in ("dev", "test") for k in topks}

    def predictions(self, part: str, topk: int) -> Floats:
        """The predictions for one split at one k."""
        return predictions(self.engine, self.parts[part], topk)

    def _step(self, step: int, seed: int) -> StepResult:
        config = self.engine.config
        result = self.engine.train_step(
            Feed(config, self.engine.place).step(self.parts["train"], step=step - 1, seed=seed),
            # A router whose behaviour depends on the step continues from the end of pre-training.
            step=self.begun + step - 1,
            learning_rate=learning_rate_at(step, config.optimizer, config.train.train_iters),
            stop=self.stop,
            accept=lambda result: math.isfinite(result.lm_loss) and math.isfinite(result.grad_norm),
            detailed=False,
        )
        if not result.applied:
            raise HyperRouterError(
                f"fine-tuning diverged: seed {seed}, step {step}, loss {result.lm_loss:g}, "
                f"gradient norm {result.grad_norm:g}",
                remedy="use a lower --lr or a longer --warmup",
            )
        return result

    def _evaluates(self, step: int) -> bool:
        total = self.engine.config.train.train_iters
        return step * self.evaluations // total > (step - 1) * self.evaluations // total


def opened(
    run: TrainedRun,
    settings: Settings,
    parts: dict[str, TextsOfSplit],
    labels: Sequence[str],
    tokenizer: Tokenizer,
    stop: Callable[[], bool],
    *,
    for_training: bool,
) -> Session:
    """A session with the weights of the run (collective); close its engine when done."""
    classifier = Classifier(len(labels), settings.dropout, frozenset(settings.freeze))
    engine: Any = run.open_engine(tokenizer, classifier=classifier, for_training=for_training)
    run.load_into(engine)
    start = keep(engine) if for_training else None
    return Session(engine, parts, run.step, settings.evaluations, stop, start)


def predictions(engine: SharedEngine, part: TextsOfSplit, topk: int, *, feed: Feed | None = None) -> Floats:
    """Logits ``_NC`` of all texts of a split, on every rank (collective)."""
    loss, feed = engine.loss, feed or Feed(engine.config, engine.place)
    assert isinstance(loss, ClassLoss), "the engine has no classifier"
    loss.kept = []
    try:
        engine.evaluate(feed.all(part), topk=topk)
        seen = [logits_BC.cpu() for logits_BC, _ in loss.kept]
    finally:
        loss.kept = None
    # The last stage has them, on each of its tensor-parallel ranks.
    own = torch.cat(seen).numpy() if seen and parallel_state.get_tensor_model_parallel_rank() == 0 else None
    everyone: list[Any] = [None] * engine.place.world_size
    dist.all_gather_object(everyone, (engine.place.data_rank, own))
    found: Floats | None = None
    for data_rank, logits in everyone:
        if logits is None:
            continue
        if found is None:
            found = np.full((len(part), logits.shape[1]), np.nan)
        rows = np.array(feed.rows_of(part, data_rank))
        found[rows[rows >= 0]] = logits[rows >= 0]
    assert found is not None
    if wrong := int((~np.isfinite(found)).any(1).sum()):
        raise HyperRouterError(
            f"with k = {topk}, the logits of {wrong} of {len(part)} texts are not finite",
            remedy="fine-tune with a lower --lr or a longer --warmup",
        )
    return found
