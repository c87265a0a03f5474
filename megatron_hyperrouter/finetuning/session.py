"""Fine-tuning with one seed: training, selection on dev, and the test.

Legend: ``N`` texts of a part, ``C`` classes.
"""

from __future__ import annotations

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
from megatron_hyperrouter.finetuning.measures import Floats, Scores, scores
from megatron_hyperrouter.finetuning.weights import Kept, keep, put_back, start_again
from megatron_hyperrouter.model.loss import ClassLoss
from megatron_hyperrouter.train.lr import learning_rate_at

if TYPE_CHECKING:
    from megatron_hyperrouter.engines.base import StepResult
    from megatron_hyperrouter.engines.shared import SharedEngine

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Outcome:
    """Of one seed: the logits ``_NC`` of dev and test at each k, from the weights that dev chose."""

    seed: int
    chosen_step: int
    logits: dict[tuple[str, int], Floats] = field(default_factory=dict)  # (part, k)


@dataclass(frozen=True)
class Session:
    """A model with a head, and the parts of a task; every method is called by all ranks together."""

    engine: SharedEngine
    parts: dict[str, TextsOfSplit]
    begun: int  # steps of the run that the weights come from
    evaluations: int
    start: Kept  # the run's weights

    def run(self, seed: int, topks: Sequence[int], tell: Tell) -> Outcome:
        """Train with this seed, take the weights that are best on dev, and predict at each k."""
        engine, train = self.engine, self.engine.config.train
        start_again(engine, self.start, seed=seed)
        topk, best, chosen, kept = self.engine.topk_at(self.begun), (-1.0, -math.inf), 0, self.start
        for step in range(1, train.train_iters + 1):
            result = self._step(step, seed)
            record: dict[str, Any] = {"seed": seed, "step": step, "loss": result.lm_loss}
            record |= {"grad_norm": result.grad_norm, "aux_loss": result.aux_loss}
            if self._evaluates(step):
                found = self._scores("dev", topk)
                record |= {"dev_accuracy": found.accuracy, "dev_loss": found.loss}
                if (found.accuracy, -found.loss) > best:
                    best, chosen, kept = (found.accuracy, -found.loss), step, keep(engine)
            tell(record)
        put_back(engine, kept)
        outcome = Outcome(seed, chosen)
        for part in ("dev", "test"):
            for k in topks:
                outcome.logits[part, k] = predictions(engine, self.parts[part], k)
        return outcome

    def _step(self, step: int, seed: int) -> StepResult:
        config = self.engine.config
        result = self.engine.train_step(
            Feed(config, self.engine.place).step(self.parts["train"], step=step - 1, seed=seed),
            # A router whose behaviour depends on the step continues from the end of pre-training.
            step=self.begun + step - 1,
            learning_rate=learning_rate_at(step, config.optimizer, config.train.train_iters),
            accept=lambda result: math.isfinite(result.lm_loss) and math.isfinite(result.grad_norm),
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

    def _scores(self, part: str, topk: int) -> Scores:
        return scores(predictions(self.engine, self.parts[part], topk), self.parts[part].classes_N)


def predictions(engine: SharedEngine, part: TextsOfSplit, topk: int, *, feed: Feed | None = None) -> Floats:
    """Logits ``_NC`` of all texts of a part, on every rank (collective)."""
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
    assert found is not None and not np.isnan(found[:, 0]).any()
    return found
