"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from megatron_hyperrouter.config.tree import OptimizerConfig


def learning_rate_at(step: float, optimizer: OptimizerConfig, train_iters: float) -> float:
    """Learning rate of step ``step``, counted from 1: linear warm-up to ``lr``, then the decay, then
    ``min_lr``.  While the batch grows, a step counts as the share of a full batch that it reads.

    The formulas are those of Megatron-LM's ``OptimizerParamScheduler`` (decay styles constant, linear,
    cosine, inverse-square-root, WSD and its shapes).  One thing differs:
    Megatron-LM takes step n with the rate after n - 1 steps, so its first step has rate 0 under warm-up; here
    step n has the rate after n steps, so warm-up step n of w uses ``lr * n / w`` and the last step of the
    decay uses ``min_lr``.
    """
    if step <= 0:
        raise ValueError(f"step = {step}: must be at least 1")
    warmup = optimizer.lr_warmup_iters
    if step <= warmup:
        return optimizer.lr_warmup_init + (optimizer.lr - optimizer.lr_warmup_init) * step / warmup
    if optimizer.lr_decay_style == "constant":
        return optimizer.lr
    decay_end = optimizer.lr_decay_iters or train_iters
    if step > decay_end:
        return optimizer.min_lr
    if optimizer.lr_decay_style == "inverse-square-root":
        return max(optimizer.min_lr, optimizer.lr * math.sqrt(max(warmup, 1) / step))
    return optimizer.min_lr + _remaining(step, optimizer, warmup, decay_end) * (
        optimizer.lr - optimizer.min_lr
    )


def _remaining(step: float, optimizer: OptimizerConfig, warmup: int, decay_end: float) -> float:
    """Share of ``lr - min_lr`` that is left at ``step``: 1 if the decay starts, 0 at ``decay_end``."""
    done = (step - warmup) / (decay_end - warmup)
    if optimizer.lr_decay_style == "linear":
        return 1.0 - done
    if optimizer.lr_decay_style == "cosine":
        return 0.5 * (math.cos(math.pi * done) + 1.0)
    anneal = optimizer.lr_wsd_decay_iters or max(decay_end // 10, 1)  # WSD: warm-up, stable, decay
    annealed = (step - (decay_end - anneal)) / anneal
    return 1.0 if annealed <= 0 else _WSD[optimizer.lr_wsd_decay_style](annealed)


_WSD: Mapping[str, Callable[[float], float]] = {  # share of WSD's decay that is done -> share that is left
    "exponential": lambda done: 2.0 * 0.5**done - 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (math.cos(math.pi * done) + 1.0),
    "minus_sqrt": lambda done: 1.0 - math.sqrt(done),
}
