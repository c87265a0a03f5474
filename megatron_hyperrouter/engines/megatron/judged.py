"""megatron-core's optimizer with a check of each step before the update."""

from __future__ import annotations

from megatron.core.optimizer import ChainedOptimizer

from megatron_hyperrouter.engines.totals import Judgement


class JudgedOptimizer(ChainedOptimizer):
    """Keeps weights and moments unchanged if the judgement of the step rejects it."""

    def __init__(self, made: ChainedOptimizer, judgement: Judgement) -> None:
        """``made``: what ``get_megatron_optimizer`` gives."""
        super().__init__(made.chained_optimizers)
        self._judgement = judgement
        self._norm = 0.0

    def get_grad_norm(self) -> float:
        """As megatron-core's, which asks for it before it clips."""
        self._norm = float(super().get_grad_norm())
        return self._norm

    def step_with_ready_grads(self) -> bool:
        """The last part of megatron-core's ``step()``: the update."""
        return self._judgement.allows(self._norm) and bool(super().step_with_ready_grads())
