"""The training loop.

Everything that varies in time is a function of the step, so a resumed run is the same run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_hyperrouter import console
from megatron_hyperrouter.guard.supervision import Supervision
from megatron_hyperrouter.train.hooks import GuardedHook
from megatron_hyperrouter.train.resuming.recovery import GivenUp, RollBack
from megatron_hyperrouter.train.resuming.resume import resume
from megatron_hyperrouter.train.resuming.start import Start, begin
from megatron_hyperrouter.train.run import Run, Speed
from megatron_hyperrouter.train.saving import NOTHING, Wish

if TYPE_CHECKING:
    from megatron_hyperrouter.checkpoint.description import Description
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.data.stream.dataset import Splits
    from megatron_hyperrouter.engines.base import Engine
    from megatron_hyperrouter.guard.stopping import StopRequest
    from megatron_hyperrouter.train.hooks import Hook
    from megatron_hyperrouter.train.written import SampleWriter


def train(
    engine: Engine,
    config: RunConfig,
    splits: Splits,
    hooks: Sequence[Hook],
    *,
    token_bytes_V: Tensor | None = None,
    speed: Speed | None = None,
    description: Description | None = None,
    supervision: Supervision | None = None,
    start: Start | None = None,
    writer: SampleWriter | None = None,
) -> int:
    """Train to ``--train-iters``, or until a rank is asked to stop; returns the number of completed steps.

    Every rank calls this; only the main rank passes ``hooks``.  ``token_bytes_V``: number of UTF-8 bytes
    of each token id, or None if unknown.  ``speed``: cost of a step, if known.  ``description``: what
    every checkpoint says about the run.  ``start``: what the run begins with; None: as the settings say.
    ``writer``: continues prompts during training.
    """
    start, described = begin(config, start, description)
    watch = supervision or Supervision()
    guarded = [GuardedHook(hook, watch.request) for hook in hooks]
    spent = speed or Speed()
    run = Run(engine, config, splits, guarded, token_bytes_V, spent, described, watch, start, writer)
    first = resume(engine, config, run.folders, start, described.meta.get("tokenizer"))
    if start.step:
        run.restore(start.manifest["meta"], start.folder)
    if run.evaluates and splits.valid is None and engine.place.is_main:
        console.note("there is no evaluation during training, because the valid split has no documents")
    with contextlib.ExitStack() as stack:
        stack.enter_context(watch.signals(config))
        for hook in guarded:
            stack.callback(hook.on_end)
            hook.on_start(first)
        stack.callback(run.saving.close)
        stack.enter_context(watch.recording_failures(config, engine, run.tell))
        stack.enter_context(watch.watchdog(config, engine, first))
        last = None
        while last is None:
            try:
                last = _steps(run, first, watch.request)
            except RollBack:
                first = run.roll_back()
    for hook in guarded:
        if hook.error is not None:
            raise hook.error
    return last


def _steps(run: Run, first: int, request: StopRequest) -> int:
    """All steps after ``first``; returns the last one."""
    engine, config = run.engine, run.config
    try:
        run.catch_up(first)
    except GivenUp:
        return _given_up(run, first, first, request)
    with run.batches(first) as batches:
        for step in range(first + 1, config.train.train_iters + 1):
            try:
                called = run.step(step, batches, request)
            except GivenUp:
                return _given_up(run, first, step - 1, request)
            if step == first + 1 and config.guard.distributed_timeout_minutes:
                engine.wait_at_most(60 * config.guard.distributed_timeout_minutes)
            last = step == config.train.train_iters
            run.follow_alarm(step)
            wish = run.saving.answer(step, request) if called else NOTHING
            if end := run.saving.stops_at(step):
                wish = Wish(end, save=False)
            if wish.stop:  # the sender of the request may not wait long: save before anything else
                run.save(step, wait=True)
            try:
                for split in run.evaluations(step):
                    run.evaluate(split, step)
            except GivenUp:
                return _given_up(run, first, step, request)
            run.write_texts(step)
            if not wish.stop and (last or wish.save or run.saving.is_due(step)):
                run.save(step, wait=last)
            run.saving.poll()
            if wish.stop and not last:
                return _stopped(run, step, wish.stop)
    if first >= config.train.train_iters and engine.place.is_main:
        console.note(f"nothing to do: {first} steps are done and --train-iters = {config.train.train_iters}")
    run.tell("end", max(first, config.train.train_iters))
    return max(first, config.train.train_iters)


def _given_up(run: Run, first: int, step: int, request: StopRequest) -> int:
    """Stop after ``step``: the step after it was dropped."""
    if step > first:
        run.save(step, wait=True)
    return _stopped(run, step, run.engine.first_word(request.reason))


def _stopped(run: Run, step: int, reason: str) -> int:
    if run.engine.place.is_main:
        run_dir = run.config.logging.run_dir
        console.note(f"stopped by {reason} after step {step}; continue with --load {run_dir}")
    run.tell("stop", step, reason=reason)
    return step
