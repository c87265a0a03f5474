"""The training loop: everything that varies in time is a function of the step, so a resumed run is the same run."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import Tensor

from megatron_hyperrouter import console
from megatron_hyperrouter.checkpoint.folder import CheckpointFolders
from megatron_hyperrouter.config.cli import launched_world_size
from megatron_hyperrouter.config.derived import accumulation_steps, global_batch_size
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.data.dataset import Splits
from megatron_hyperrouter.data.loader import Batches
from megatron_hyperrouter.engines.base import Batch, Engine
from megatron_hyperrouter.errors import DataError
from megatron_hyperrouter.train.hooks import Hook
from megatron_hyperrouter.train.lr import learning_rate_at
from megatron_hyperrouter.train.metrics import Record, check_finite, evaluation_record, score, training_record
from megatron_hyperrouter.train.resume import resume, run_meta


def train(engine: Engine, config: RunConfig, splits: Splits, hooks: Sequence[Hook], *, token_bytes_V: Tensor | None = None) -> int:
    """Train to ``--train-iters``, or until a SIGTERM reaches any rank; returns the number of completed steps.

    Every rank calls this; only the main rank brings ``hooks``.  ``token_bytes_V``: UTF-8 bytes of each token id, or None
    where they are not known.
    """
    run = _Run(engine, config, splits, hooks, token_bytes_V)
    first = resume(engine, config, run.folders)
    if run.evaluates and splits.valid is None and engine.place.is_main:
        console.note("no evaluation during training: the valid split has no documents")
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.on_end)
            hook.on_start(first)
        stop = stack.enter_context(stop_signal(enabled=config.train.exit_on_signal))
        batches = stack.enter_context(run.batches(first))
        for step in range(first + 1, config.train.train_iters + 1):
            record, stopped = run.step(step, batches, stop=stop.came)
            check_finite(record, remedy=run.remedy())
            last = step == config.train.train_iters
            if stopped:  # whoever sent the signal may not wait long: save before anything else
                run.save(step)
            if run.evaluates and (last or step % config.train.eval_interval == 0):
                run.evaluate("valid", step)
                if last:
                    run.evaluate("test", step)
            if not stopped and (last or (config.checkpoint.save_interval and step % config.checkpoint.save_interval == 0)):
                run.save(step)
            if stopped:
                return step
    if first >= config.train.train_iters and engine.place.is_main:
        console.note(f"nothing to do: {first} steps are done, --train-iters is {config.train.train_iters}")
    return max(first, config.train.train_iters)


def samples_needed(config: RunConfig, world_size: int | None = None) -> dict[str, int]:
    """How many samples ``build_splits`` must hold: ``train_samples``, ``valid_samples``, ``test_samples``.

    Every evaluation scores the same ``--eval-iters`` global batches, so that its losses can be compared.
    """
    batch = global_batch_size(config, launched_world_size() if world_size is None else world_size)
    scored = config.train.eval_iters * batch if config.train.eval_interval else 0
    return {"train_samples": config.train.train_iters * batch, "valid_samples": scored, "test_samples": scored}


@dataclass
class _Run:
    """One run and the four things it does: step, evaluate, save, and tell the hooks."""

    engine: Engine
    config: RunConfig
    splits: Splits
    hooks: Sequence[Hook]
    token_bytes_V: Tensor | None

    def __post_init__(self) -> None:
        world_size = self.engine.place.world_size
        self.global_batch_size = global_batch_size(self.config, world_size)
        self.micro_batches = accumulation_steps(self.config, world_size)
        root = Path(self.config.logging.run_dir) / "checkpoints"
        self.folders = CheckpointFolders(root, self.engine, keep=self.config.checkpoint.keep_checkpoints)

    @property
    def evaluates(self) -> bool:
        """True where the settings ask for evaluations."""
        return self.config.train.eval_interval > 0 and self.config.train.eval_iters > 0

    def batches(self, first: int) -> Batches:
        """This rank's micro-batches from step ``first + 1`` on: their position is ``step * global batch size``."""
        if self.splits.train is None:
            raise DataError("there are no samples to train on", remedy="give training a share with --split, or --train-data-path")
        place = self.engine.place
        return Batches(
            self.splits.train,
            micro_batch_size=self.config.train.micro_batch_size,
            global_batch_size=self.global_batch_size,
            data_rank=place.data_rank,
            data_size=place.data_size,
            start_step=first,
            num_steps=max(self.config.train.train_iters - first, 0),
            num_workers=self.config.data.num_workers,
        )

    def step(self, step: int, batches: Iterator[Batch], *, stop: bool) -> tuple[Record, bool]:
        """Take step ``step``, counted from 1; returns its record and whether some rank was asked to stop."""
        learning_rate = learning_rate_at(step, self.config.optimizer, self.config.train.train_iters)
        started = time.perf_counter()
        result = self.engine.train_step(islice(batches, self.micro_batches), step=step - 1, learning_rate=learning_rate, stop=stop)
        record = training_record(
            result,
            step=step,
            learning_rate=learning_rate,
            topk=self.engine.topk_at(step - 1),
            global_batch_size=self.global_batch_size,
            seq_length=self.config.model.seq_length,
            step_time=time.perf_counter() - started,
        )
        for hook in self.hooks:
            hook.on_step(record)
        return record, result.stop

    def evaluate(self, split: str, step: int) -> None:
        """Score a split, if there is one, after ``step`` steps with the k that the next step would have."""
        dataset = self.splits.valid if split == "valid" else self.splits.test
        if dataset is None:
            return
        topk = self.engine.topk_at(step)
        micro_batches = self.config.train.eval_iters * self.micro_batches
        result = score(
            self.engine,
            dataset,
            topk=topk,
            micro_batch_size=self.config.train.micro_batch_size,
            num_batches=micro_batches,
            token_bytes_V=self.token_bytes_V,
        )
        record = evaluation_record(result, step=step, split=split, topk=topk)
        for hook in self.hooks:
            hook.on_evaluation(record)

    def save(self, step: int) -> None:
        """Write a checkpoint of ``step`` steps."""
        folder = self.folders.save(step, self.engine.save, run_meta(self.config, self.engine))
        for hook in self.hooks:
            hook.on_save(step, folder)

    def remedy(self) -> str:
        """What to do when the loss is lost."""
        steps = self.folders.steps()
        back = f"continue after step {steps[-1]} with --load {self.config.logging.run_dir}" if steps else "start again"
        return f"{back}, and use a lower --lr, more --lr-warmup-iters, or a --clip-grad greater than 0"


class StopRequest:
    """Whether SIGTERM came.  A bare attribute: a signal handler must not take a lock, as ``threading.Event`` does."""

    came = False


@contextlib.contextmanager
def stop_signal(*, enabled: bool) -> Iterator[StopRequest]:
    """A request that SIGTERM sets instead of ending the process."""
    request = StopRequest()

    def note(number: int, frame: object) -> None:
        request.came = True

    if not enabled or threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield request
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
