"""Fine-tune a trained run with a classification head, and test it at several k.

The task folder contains train.jsonl, dev.jsonl and test.jsonl ({"text", "label"}) and labels.json, or the
original files of SST-2, SST-5, IMDB or BANKING77. For each seed N, the weights with the best score on dev are
tested once and saved in the folder seed-N of --output. The command writes results.json, predictions.jsonl,
training.jsonl and finetuning.json to --output, too. After an interruption, run the same command again to
continue. --test tests saved weights again, and --compare compares two output folders. The command runs in one
process, or on several ranks under torchrun or deepspeed.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter import console
from megatron_hyperrouter.commands.models.finetune_flags import layout_of, own_flags, read_flags, settings_of
from megatron_hyperrouter.errors import STOPPED, ConfigError, Problem
from megatron_hyperrouter.evaluate.trained import TrainedRun
from megatron_hyperrouter.files import check_output as check_file
from megatron_hyperrouter.files import write_json
from megatron_hyperrouter.finetuning.settings import Settings, check, fitted, overrides
from megatron_hyperrouter.terminal import Bar, show

if TYPE_CHECKING:
    from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer
    from megatron_hyperrouter.finetuning.batches import TextsOfSplit
    from megatron_hyperrouter.finetuning.session import Session
    from megatron_hyperrouter.finetuning.tasks import Task
    from megatron_hyperrouter.guard.stopping import StopRequest


def main(arguments: Sequence[str]) -> None:
    """A fine-tuning run, a test of saved weights, or a comparison of two runs."""
    args = read_flags(arguments, __doc__ or "")
    if args.compare:
        compare(*args.compare, output=args.output)
        return
    from megatron_hyperrouter.compat.host_logs import silence_hosts
    from megatron_hyperrouter.guard.stopping import StopRequest, stop_signals

    silence_hosts()
    work = Work.of(args)
    for note in work.task.notes:
        console.note(note)
    if args.test:
        work.test()
        return
    with stop_signals(StopRequest(), enabled=True) as request:
        ended = work.finetune(request)
    if not ended:
        sys.exit(STOPPED)


@dataclass(frozen=True)
class Work:
    """One fine-tuning, or one test of saved weights; ``run`` has the settings for it."""

    output: Path
    settings: Settings
    run: TrainedRun
    task: Task
    tokenizer: Tokenizer

    @classmethod
    def of(cls, args: Namespace) -> Work:
        """What the flags ask for; raises an error if this is not possible."""
        from megatron_hyperrouter.config.cli import launched_world_size
        from megatron_hyperrouter.finetuning.tasks import read_task

        settings = settings_of(args)
        run = TrainedRun.open(args.load, tokenizer_model=args.tokenizer_model, headed=True)
        check(settings, run.settings)
        task, tokenizer = read_task(args.task), run.tokenizer()
        asked = overrides(
            settings,
            router=run.settings.router.name,
            trained_topk=trained_topk(run),
            layout=layout_of(args),
            steps=settings.steps_for(len(task.parts["train"])),
        )
        with own_flags():
            run = TrainedRun.open(
                args.load,
                world_size=launched_world_size(),
                tokenizer_model=args.tokenizer_model,
                overrides=asked,
                headed=True,
            )
        work = cls(args.output, settings, run, task, tokenizer)
        if args.test:
            check_labels(args, run, task)
        check_output(args.output, None if args.test else work.facts)
        return work

    @property
    def seeds(self) -> range:
        """From 1."""
        return range(1, self.settings.seeds + 1)

    @cached_property
    def topks(self) -> list[int]:
        """The numbers of active experts to test with."""
        return list(dict.fromkeys(self.settings.topk or (self.run.settings.model.moe_router_topk,)))

    @cached_property
    def parts(self) -> dict[str, TextsOfSplit]:
        """The texts as tokens."""
        from megatron_hyperrouter.finetuning.batches import encoded

        length = self.run.settings.model.seq_length
        return {name: encoded(each, self.tokenizer, length) for name, each in self.task.parts.items()}

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a reader of the results needs to know; a fine-tuning continues only with the same facts."""
        model = self.run.settings.model
        return {
            "checkpoint": str(self.run.checkpoint),
            "step": self.run.step,
            "router": self.run.settings.router.name,
            "finetune_k": model.moe_router_topk,
            "steps": self.run.settings.train.train_iters,
            "seq_length": model.seq_length,
            "settings": asdict(self.settings),
            "labels": list(self.task.labels),
            "texts": {name: len(examples) for name, examples in self.task.parts.items()},
            "notes": list(self.task.notes),
        }

    def open(self, stop: Callable[[], bool], *, for_training: bool) -> Session:
        """The model with a head and the weights of ``--load`` (collective); close its engine when done."""
        from megatron_hyperrouter.config.cli import launched_world_size
        from megatron_hyperrouter.finetuning.session import opened

        longest = max(part.longest for part in self.parts.values())
        fit = fitted(self.run.settings, self.settings, longest=longest, world_size=launched_world_size())
        fitting = replace(self.run, settings=fit)
        return opened(
            fitting,
            self.settings,
            self.parts,
            self.task.labels,
            self.tokenizer,
            stop,
            for_training=for_training,
        )

    def finetune(self, request: StopRequest) -> bool:
        """Fine-tune with all seeds; returns False if a request has stopped it before its end."""
        from megatron_hyperrouter.finetuning import reports

        session = self.open(lambda: request.came, for_training=True)
        engine: Any = session.engine
        try:
            if engine.place.is_main:
                reports.write_facts(self.output, self.facts)
            ended = self.all_seeds(session)
            reason = engine.first_word(request.reason)
            if engine.place.is_main and ended:
                for line in reports.table(reports.join(self.output, self.seeds, self.facts)):
                    show(line)
            elif engine.place.is_main:
                again = "run the same command again to continue"
                console.note(f"stopped by {reason}; the state was saved to {self.output}; {again}")
        finally:
            engine.close()
        return ended

    def all_seeds(self, session: Session) -> bool:
        """Fine-tune with each seed that is not finished yet; False if the fine-tuning was asked to stop."""
        from megatron_hyperrouter.finetuning import reports, saved

        total = self.settings.seeds * self.run.settings.train.train_iters
        with Bar("fine-tune", "steps") as bar:

            def tell(record: Mapping[str, Any]) -> None:
                if session.engine.place.is_main:
                    dev = [f"dev {record['dev_accuracy']:.4f}"] if "dev_accuracy" in record else []
                    done = (record["seed"] - 1) * self.run.settings.train.train_iters + record["step"]
                    bar.update(done, total, ", ".join([f"loss {record['loss']:.4f}", *dev]))

            for seed in self.seeds:
                if reports.is_finished(self.output, seed):
                    continue
                own = reports.folder_of(self.output, seed)
                about = {"labels": list(self.task.labels), "seed": seed}
                folder = saved.seed_folder(own, session.engine, self.run, self.tokenizer, about)
                outcome = session.run(seed, self.topks, folder, tell)
                if outcome is None:
                    return False
                if session.engine.place.is_main:
                    reports.write_seed(folder.path, outcome, self.parts)
                    folder.finish()
        return True

    def test(self) -> None:
        """Test the saved weights of ``--load`` on this task."""
        from megatron_hyperrouter.finetuning import reports, saved
        from megatron_hyperrouter.finetuning.session import Outcome

        session = self.open(bool, for_training=False)
        engine: Any = session.engine
        try:
            seed = saved.seed_of(self.run.manifest["meta"])
            outcome = Outcome(seed, 0, session.tested(self.topks))
            if engine.place.is_main:
                reports.write_facts(self.output, self.facts)
                reports.write_seed(self.output, outcome, self.parts)
                for line in reports.table(reports.rows_of(outcome, self.parts)):
                    show(line)
        finally:
            engine.close()


def check_labels(args: Namespace, run: TrainedRun, task: Task) -> None:
    """An error if the run has no head, or one for other labels."""
    from megatron_hyperrouter.errors import DataError
    from megatron_hyperrouter.finetuning.saved import labels_of

    labels = labels_of(run.manifest["meta"])
    if labels is None:
        rule, remedy = (
            "has no classification head",
            "give a seed-N folder that mhr finetune has written, or leave out --test",
        )
        raise ConfigError([Problem("--load", args.load, rule, remedy)])
    if labels != list(task.labels):
        raise DataError(
            f"--task {args.task} does not have the labels that {args.load} was fine-tuned on",
            remedy="use a task whose labels.json has the same labels in the same order",
        )


def check_output(output: Path, facts: Mapping[str, Any] | None) -> None:
    """ConfigError if there are already results, or part of a fine-tuning with other ``facts``, or if nothing
    can be written there; ``facts``: None for a test.
    """
    from megatron_hyperrouter.finetuning import reports

    rule = "already contains results" if (output / reports.RESULTS).exists() else ""
    if not rule and (output / reports.FACTS).exists():
        rule = other_than(reports.read_facts(output), facts)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"cannot be created: {error.strerror or error}"
    if rule:
        raise ConfigError(
            [Problem("--output", output, rule, ("give another folder, or move this folder away"))]
        )


def other_than(earlier: Mapping[str, Any], facts: Mapping[str, Any] | None) -> str:
    """Why the fine-tuning that ``earlier`` describes cannot continue, or ""; more seeds are allowed."""
    if facts is None:
        return "contains an unfinished fine-tuning run"
    before, now = map(_comparable, (earlier, facts))
    for name, value in now.items():
        if before.get(name) != value:
            differs = f"{name} was {before.get(name)} and is now {value}"
            return f"contains an unfinished fine-tuning run with other settings ({differs})"
    return ""


def _comparable(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that must be equal, in the form in which JSON returns them."""
    flat = {**facts, **facts.get("settings", {})}
    left_out = ("settings", "seeds", "notes", "chosen_steps")
    return {name: json.loads(json.dumps(value)) for name, value in flat.items() if name not in left_out}


def trained_topk(run: TrainedRun) -> int:
    """The k at which training ended."""
    from megatron_hyperrouter.engines.routing import topk_schedule

    return topk_schedule(run.settings)(run.step)


def compare(first: Path, second: Path, *, output: Path | None) -> None:
    """Two fine-tuning runs on one task; a table, and JSON where a file is named."""
    from megatron_hyperrouter.finetuning import reports

    if output is not None:
        check_file(output)
    found = reports.compare(first, second)
    for line in reports.comparison_table(found):
        show(line)
    if output is not None:
        write_json(output, {"first": str(first), "second": str(second), "results": found})
