"""The training loop.

Everything that varies in time is a function of the step, so a resumed run is the same run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_hyperrouter import console
from megatron_hyperrouter.checkpoint.description import Description, describe
from megatron_hyperrouter.guard.stopping import StopRequest, stop_signals
from megatron_hyperrouter.train.metrics import check_finite
from megatron_hyperrouter.train.resume import resume
from megatron_hyperrouter.train.run import Run, Speed

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.data.stream.dataset import Splits
    from megatron_hyperrouter.engines.base import Engine
    from megatron_hyperrouter.train.hooks import Hook


def train(
    engine: Engine,
    config: RunConfig,
    splits: Splits,
    hooks: Sequence[Hook],
    *,
    token_bytes_V: Tensor | None = None,
    speed: Speed | None = None,
    description: Description | None = None,
) -> int:
    """Train to ``--train-iters``, or until a rank is asked to stop; returns the number of completed steps.

    Every rank calls this; only the main rank brings ``hooks``.  ``token_bytes_V``: UTF-8 bytes of each token
    id, or None where they are not known.  ``speed``: what a step costs, where it is known.  ``description``:
    what every checkpoint says about the run.
    """
    run = Run(engine, config, splits, hooks, token_bytes_V, speed or Speed(), description or describe(config))
    first = resume(engine, config, run.folders)
    if run.evaluates and splits.valid is None and engine.place.is_main:
        console.note("no evaluation during training: the valid split has no documents")
    with contextlib.ExitStack() as stack:
        request = stack.enter_context(stop_signals(StopRequest(), enabled=config.train.exit_on_signal))
        for hook in hooks:
            stack.callback(hook.on_end)
            hook.on_start(first)
        batches = stack.enter_context(run.batches(first))
        for step in range(first + 1, config.train.train_iters + 1):
            record, stopped = run.step(step, batches, request)
            check_finite(record, remedy=run.remedy)
            last = step == config.train.train_iters
            if stopped:  # whoever sent the signal may not wait long: save before anything else
                run.save(step)
            if run.evaluates and (last or step % config.train.eval_interval == 0):
                run.evaluate("valid", step)
                if last:
                    run.evaluate("test", step)
            if not stopped and (
                last or (config.checkpoint.save_interval and step % config.checkpoint.save_interval == 0)
            ):
                run.save(step)
            if stopped and not last:
                reason = engine.first_word(request.reason)
                if engine.place.is_main:
                    run_dir = config.logging.run_dir
                    console.note(f"stopped by {reason} after step {step}; continue with --load {run_dir}")
                return step
    if first >= config.train.train_iters and engine.place.is_main:
        console.note(f"nothing to do: {first} steps are done, --train-iters is {config.train.train_iters}")
    return max(first, config.train.train_iters)
