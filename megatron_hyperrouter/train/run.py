"""One run and its actions: take a step, evaluate, save; the loop decides when."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_hyperrouter.checkpoint.folder import folder_name, read_manifest
from megatron_hyperrouter.config.derived import batch_sizes
from megatron_hyperrouter.data.stream.loader import Batches
from megatron_hyperrouter.data.stream.segments import TrainingSamples
from megatron_hyperrouter.errors import CheckpointError, DataError, HyperRouterError, in_words
from megatron_hyperrouter.train import lr, saving
from megatron_hyperrouter.train.metrics import (
    Record,
    StepFacts,
    evaluation_record,
    score,
    scored_splits,
    training_record,
)
from megatron_hyperrouter.train.resuming import recovery, run_meta

if TYPE_CHECKING:
    from megatron_hyperrouter.checkpoint.description import Description
    from megatron_hyperrouter.checkpoint.folder import CheckpointFolders
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.data.stream.dataset import Splits
    from megatron_hyperrouter.engines.base import Batch, Engine
    from megatron_hyperrouter.guard.events import Fact
    from megatron_hyperrouter.guard.stopping import StopRequest
    from megatron_hyperrouter.guard.supervision import Supervision
    from megatron_hyperrouter.train.hooks import Hook
    from megatron_hyperrouter.train.resuming.start import Start
    from megatron_hyperrouter.train.written import SampleWriter


@dataclass(frozen=True)
class Speed:
    """What a step costs and what the devices could do, where that is known."""

    flops_per_token: Callable[[int], float] = lambda topk: 0.0  # forward and backward, at k
    peak_flops: float | None = None  # a second, of one device


@dataclass
class Run:
    """What the loop acts on; every method but the properties is called by all ranks together."""

    engine: Engine
    config: RunConfig
    splits: Splits
    hooks: Sequence[Hook]
    token_bytes_V: Tensor | None
    speed: Speed
    description: Description  # which every checkpoint carries
    supervision: Supervision
    start: Start
    writer: SampleWriter | None = None

    def __post_init__(self) -> None:
        # Of the newest save: when it began, and for how long training waited; None: it still waits.
        self._save_begun = time.perf_counter()
        self._waited: float | None = None
        self._evaluated: set[tuple[str, int]] = set()  # splits, after the step that was evaluated last
        world_size = self.engine.place.world_size
        self.batch_sizes = batch_sizes(self.config, world_size)
        self.recovery = recovery.Recovery(self.engine, self.config, remedy=self.lost)
        interval = self.config.guard.check_replicas_interval
        self.replicas = recovery.ReplicaCheck(self.engine, interval, step=self.start.step)
        self.saving = saving.Saving(
            self.engine,
            self.config,
            texts=self.description.texts,
            meta=self._meta,
            saved=self._saved,
            remedy=self.remedy,
            begun=self.start.step,
        )

    @property
    def folders(self) -> CheckpointFolders:
        """The checkpoints of this run."""
        return self.saving.folders

    @property
    def evaluates(self) -> bool:
        """True if the settings ask for evaluations."""
        return self.config.train.eval_interval > 0 and self.config.train.eval_iters > 0

    def batches(self, first: int) -> Batches:
        """This rank's micro-batches from step ``first + 1`` on."""
        if self.splits.train is None:
            raise DataError(
                "there are no training samples",
                remedy="give the training split a share with --split, or add --train-data-path",
            )
        place = self.engine.place
        return Batches(
            self.splits.train,
            micro_batch_size=self.config.train.micro_batch_size,
            global_batch_size=self.batch_sizes.full,
            rampup=self.config.train.rampup_batch_size,
            data_rank=place.data_rank,
            data_size=place.data_size,
            start_step=first,
            num_steps=max(self.config.train.train_iters - first, 0),
            num_workers=self.config.data.num_workers,
        )

    def step(self, step: int, batches: Batches, request: StopRequest) -> bool:
        """Take step ``step``, counted from 1; returns whether some rank asks the others.

        See :meth:`Saving.answer`.
        """
        progress = self.batch_sizes.progress
        learning_rate = lr.learning_rate_at(
            progress(step), self.config.optimizer, progress(self.config.train.train_iters)
        )
        started, waited = time.perf_counter(), batches.waited
        if not self.recovery.takes_part(step):
            return self._leave_out(step, batches, request)
        on_the_screen = step % self.config.logging.log_interval == 0 or step == self.config.train.train_iters
        result = self.engine.train_step(
            self.supervision.progress.through(self._of_step(step, batches), "data", "step", step - 1),
            step=step - 1,
            learning_rate=learning_rate,
            stop=lambda: self._asks(request),
            accept=lambda result: not result.give_up and self.recovery.accept(result),
            detailed=on_the_screen,
        )
        if result.give_up and not result.applied:
            raise recovery.GivenUp
        topk = self.engine.topk_at(step - 1)
        tokens = self.batch_sizes.size(step - 1) * self.config.model.seq_length
        facts = StepFacts(
            step=step,
            result=result,
            learning_rate=learning_rate,
            topk=topk,
            tokens=tokens,
            consumed=self.consumed(step),
            step_time=time.perf_counter() - started,
            data_time=batches.waited - waited,
            devices=self.engine.place.world_size,
            flops=tokens * self.speed.flops_per_token(topk),
            peak_flops=self.speed.peak_flops,
        )
        record = training_record(facts, with_all_layers=on_the_screen)
        similarity = self.similarity(step) if result.applied else None
        record |= {f"router/similarity/{layer}": value for layer, value in (similarity or {}).items()}
        for hook in self.hooks:
            hook.on_step(record)
        if result.applied:
            self.saving.health.after_step(step, result.lm_loss)
            self.recovery.after_good_step(step, result, self.tell, similarity)
            self.replicas.after(step, self.tell)
        else:
            if self.config.guard.on_bad_step == "rollback":  # a checkpoint that is being written counts, too
                self.saving.settle(step - 1)
            self.recovery.after_bad_step(step, result, self.tell, self._newest())
        return result.stop

    def _newest(self) -> int | None:
        """The step of the newest checkpoint (collective).  Rank 0 decides, because other ranks may see a new
        checkpoint later.
        """
        return int(self.engine.first_word(str(max(self.folders.steps(), default=0)))) or None

    def _of_step(self, step: int, batches: Batches) -> Iterator[Batch]:
        """This rank's micro-batches of one step."""
        together = self.config.train.micro_batch_size * self.engine.place.data_size
        return islice(batches, self.batch_sizes.size(step - 1) // together)

    def similarity(self, step: int) -> dict[int, float] | None:
        """How similar the experts of each layer are after step ``step``, at the measuring interval
        (collective).
        """
        interval = self.config.guard.expert_similarity_interval
        if not interval or step % interval:
            return None
        dataset = self.splits.valid or self.splits.train
        assert dataset is not None, "there are samples to train on"
        count = min(self.config.train.micro_batch_size, len(dataset))
        rows = [torch.as_tensor(dataset[i]) for i in range(count)]
        return self.engine.expert_similarity(torch.stack(rows)[:, :-1].long(), topk=self.engine.topk_at(step))

    def _leave_out(self, step: int, batches: Batches, request: StopRequest) -> bool:
        for _ in self._of_step(step, batches):
            pass
        samples, tokens = self.consumed(step)
        record: Record = {"step": step, "skipped": True, "lm_loss": None}
        record |= {"consumed_samples": samples, "consumed_tokens": tokens}
        for hook in self.hooks:
            hook.on_step(record)
        return self.engine.leave_out(step - 1, lambda: self._asks(request))

    def _asks(self, request: StopRequest) -> int:
        """See :meth:`Saving.asks`; looks for the launcher first, as the watchdog may notice its end late."""
        self.supervision.launcher.tell(request)
        return self.saving.asks(request)

    def _gives_up(self) -> bool:
        """Whether the launcher of some rank has died (collective)."""
        request = self.supervision.request
        self.supervision.launcher.tell(request)
        return self.engine.any_rank(request.at_once)

    def follow_alarm(self, step: int) -> None:
        """Save, or save and stop, where an alarm of this step asks for it (collective)."""
        asked = self.recovery.asked
        if self.recovery.good_until is not None:
            self.folders.keep_newest_until(self.recovery.good_until)
        if asked:
            self.save(step, wait=asked == "stop")
            self.saving.keep(step)
        if asked == "stop":
            remedy = (
                "read events.jsonl, change the settings that caused the alarm, and continue with --load "
                f"{self.config.logging.run_dir}"
            )
            raise HyperRouterError(
                (f"step {step}: an alarm stopped the run; a checkpoint of this step was saved"), remedy=remedy
            )

    def restore(self, meta: dict[str, Any], folder: Path | None) -> None:
        """Continue to judge steps like the run that wrote the checkpoint in ``folder``."""
        try:
            self.recovery.restore(meta)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(
                f"{folder}: the history in manifest.json cannot be used: {in_words(error)}",
                remedy="load an older checkpoint of this run",
            ) from error

    def roll_back(self) -> int:
        """Return to the newest checkpoint (collective); returns its step."""
        self.saving.settle(self.supervision.progress.step)
        step = self._newest()
        assert step is not None, "the run returns only where there is a checkpoint"
        folder = self.folders.root / folder_name(step)
        self.engine.load(folder)
        self.restore(read_manifest(folder)["meta"], folder)
        self.replicas.returned(step)
        self._evaluated = {each for each in self._evaluated if each[1] <= step}
        for hook in self.hooks:
            hook.on_return(step)
        return step

    def consumed(self, step: int) -> tuple[int, int]:
        """Samples and tokens that the run has read after ``step`` steps, with those of other settings before
        a checkpoint.
        """
        if isinstance(self.splits.train, TrainingSamples):
            return self.splits.train.consumed(step)
        samples = self.batch_sizes.samples(step)
        return samples, samples * self.config.model.seq_length

    def evaluations(self, step: int) -> tuple[str, ...]:
        """The splits that are scored after ``step`` steps."""
        if not self.evaluates:
            return ()
        if step == self.config.train.train_iters:
            return "valid", "test"
        return () if step % self.config.train.eval_interval else ("valid",)

    def catch_up(self, step: int) -> None:
        """Do the evaluation that was due after ``step`` steps, if the run was stopped before it.

        The checkpoint says that it was due, and ``metrics.jsonl`` does not have the scores.
        """
        due = self.start.manifest.get("meta", {}).get("evaluation_due")
        if due and self.start.step and step == self.start.step:  # --finetune starts at 0, from another run
            metrics = Path(self.config.logging.run_dir) / "metrics.jsonl"
            known = scored_splits(metrics, step) if self.engine.place.is_main else set()
            for split in self.evaluations(step):
                if split in due and not self.engine.any_rank(split in known):
                    self.evaluate(split, step)

    def evaluate(self, split: str, step: int) -> None:
        """Score a split, if there is one, after ``step`` steps with the k that the next step would have.

        Raises GivenUp if the launcher has died meanwhile.
        """
        dataset = self.splits.valid if split == "valid" else self.splits.test
        if dataset is None:
            return
        self.supervision.progress.enter(f"evaluation of {split}", step)
        topk = self.engine.topk_at(step)
        result = score(
            self.engine,
            self.supervision.progress.of_reading(dataset),
            topk=topk,
            micro_batch_size=self.config.train.micro_batch_size,
            num_samples=self.config.train.eval_iters * self.batch_sizes.full,
            token_bytes_V=self.token_bytes_V,
            stop=self._gives_up,
        )
        if self._gives_up():
            raise recovery.GivenUp
        self._evaluated = {each for each in self._evaluated if each[1] == step} | {(split, step)}
        record = evaluation_record(result, step=step, split=split, topk=topk)
        for hook in self.hooks:
            hook.on_evaluation(record)

    def write_texts(self, step: int) -> None:
        """Continue the prompts, where they are due after ``step`` steps."""
        if self.writer is not None and self.writer.due(step):
            self.supervision.progress.enter("texts", step)
            self.writer.tell(self.engine, step, topk=self.engine.topk_at(step))

    def save(self, step: int, *, wait: bool = False) -> None:
        """Write a checkpoint of ``step`` steps; see :meth:`Saving.save`."""
        self.supervision.progress.enter("save", step)
        self.replicas.after(step, self.tell, saves=True)
        self._save_begun, self._waited = time.perf_counter(), None
        self.saving.save(step, wait=wait)
        self._waited = time.perf_counter() - self._save_begun

    def _meta(self, step: int) -> dict[str, Any]:
        meta = {**run_meta.run_meta(self.config, self.engine), **self.description.meta}
        meta |= self.recovery.meta()
        if due := [split for split in self.evaluations(step) if (split, step) not in self._evaluated]:
            meta["evaluation_due"] = due
        if self.start.finetuned_from is not None:
            meta["finetuned_from"] = self.start.finetuned_from
        if isinstance(self.splits.train, TrainingSamples):
            meta["data"] = self.splits.train.ledger(step)
        return meta

    def _saved(self, step: int, folder: Path) -> None:
        for hook in self.hooks:
            hook.on_save(step, folder)
        taken = time.perf_counter() - self._save_begun
        waited = taken if self._waited is None else self._waited
        self.tell("save", step, folder=str(folder), seconds=round(taken, 3), waited=round(waited, 3))

    def tell(self, event: str, step: int, **facts: Fact) -> None:
        """Report an event to all hooks."""
        for hook in self.hooks:
            hook.on_event(event, step, **facts)

    def lost(self, step: int) -> str:
        """What to do when the loss is lost (collective); no save that is still being written may count
        afterwards.
        """
        with contextlib.suppress(CheckpointError):
            self.saving.settle(step)
        return self.remedy()

    def remedy(self) -> str:
        """What to do when the weights are lost: continue from the newest checkpoint known to be good."""
        run_dir, steps = self.config.logging.run_dir, self.folders.steps()
        proved = self.folders.back_to_proved()
        back = (
            f"continue from the checkpoint of step {proved or steps[-1]} with --load {run_dir}"
            if steps
            else "start again"
        )
        if proved is not None and proved < steps[-1]:
            back += f" (the checkpoint of step {steps[-1]} may have bad weights)"
        clip = self.config.optimizer.clip_grad
        clipping = f"a --clip-grad less than {clip:g}" if clip else "--clip-grad 1.0"
        return f"{back}, and try a lower --lr, a larger --lr-warmup-iters, {clipping}, or --on-bad-step skip"
