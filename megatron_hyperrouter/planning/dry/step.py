"""A training step in a dry run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig


def take_step(engine: Any, config: RunConfig) -> None:
    """A step on fake tokens."""
    from megatron_hyperrouter.config.derived import accumulation_steps
    from megatron_hyperrouter.engines import shared
    from megatron_hyperrouter.engines.base import StepResult

    train, place = config.train, engine.place
    count = accumulation_steps(config, place.world_size)
    tokens_BS = torch.zeros(train.micro_batch_size, config.model.seq_length, dtype=torch.int64)

    def result(own: Any, statistics: Any, *args: Any, **kwargs: Any) -> tuple[StepResult, Any]:
        sums = statistics.take()
        total = torch.cat((own, torch.zeros(2 + 3 * place.world_size, dtype=own.dtype), sums.flatten()))
        dist.all_reduce(total)
        return StepResult(1.0, 1.0, 1.0, 1.0, {}, False, 0, ()), sums

    shared.step_result = result  # type: ignore[assignment, attr-defined]
    engine._end_step = lambda step, sums: engine.weights_changed()
    now = shared._Step([(tokens_BS, tokens_BS)] * count, 0, 1e-3, {})
    engine._run(now, lambda: False, lambda result: True)
