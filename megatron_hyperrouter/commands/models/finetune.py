"""Train a classification head on a trained run, and test it at several k.

The task folder contains train.jsonl, dev.jsonl and test.jsonl ({"text", "label"}) and labels.json, or the
original files of SST-2, SST-5, IMDB or BANKING77. The weights with the best score on dev are tested, once.
Writes results.json, predictions.jsonl, training.jsonl and finetuning.json to --output. Runs in one process,
or on several ranks under torchrun or deepspeed. --compare compares two such output folders instead.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter import console
from megatron_hyperrouter.commands.models.finetune_flags import layout_of, read_flags, settings_of
from megatron_hyperrouter.errors import ConfigError, HyperRouterError, Problem
from megatron_hyperrouter.evaluate.trained import TrainedRun
from megatron_hyperrouter.files import write_json, write_text
from megatron_hyperrouter.finetuning.settings import Settings, check, fitted, overrides
from megatron_hyperrouter.terminal import Bar, show

if TYPE_CHECKING:
    from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer
    from megatron_hyperrouter.finetuning.batches import TextsOfSplit
    from megatron_hyperrouter.finetuning.tasks import Task


def main(arguments: Sequence[str]) -> None:
    """Settings, task -> model with a head -> each seed -> results; or a comparison."""
    args = read_flags(arguments, __doc__ or "")
    if args.compare:
        compare(*args.compare, output=args.output)
        return
    from megatron_hyperrouter.compat.host_logs import silence_hosts
    from megatron_hyperrouter.config.cli import launched_world_size
    from megatron_hyperrouter.finetuning.tasks import read_task

    silence_hosts()
    settings = settings_of(args)
    run = TrainedRun.open(args.load, tokenizer_model=args.tokenizer_model)
    check(settings, run.settings)
    task = read_task(args.task)
    for note in task.notes:
        console.note(note)
    tokenizer = run.tokenizer()
    asked = overrides(
        settings,
        router=run.settings.router.name,
        trained_topk=trained_topk(run),
        layout=layout_of(args),
        steps=settings.steps_for(len(task.parts["train"])),
    )
    run = TrainedRun.open(
        args.load,
        world_size=launched_world_size(),
        tokenizer_model=args.tokenizer_model,
        overrides=asked,
    )
    check_output(args.output)
    finetune(args, settings, run, task, tokenizer)


def finetune(args: Namespace, settings: Settings, run: TrainedRun, task: Task, tokenizer: Tokenizer) -> None:
    """Fine-tune a run with all seeds; ``run`` has the settings of the fine-tuning."""
    from dataclasses import replace

    from megatron_hyperrouter.config.cli import launched_world_size
    from megatron_hyperrouter.finetuning import reports
    from megatron_hyperrouter.finetuning.batches import encoded
    from megatron_hyperrouter.finetuning.session import Session
    from megatron_hyperrouter.finetuning.weights import keep
    from megatron_hyperrouter.model.classifier import Classifier

    length = run.settings.model.seq_length
    parts = {name: encoded(examples, tokenizer, length) for name, examples in task.parts.items()}
    longest = max(part.longest for part in parts.values())
    run = replace(
        run, settings=fitted(run.settings, settings, longest=longest, world_size=launched_world_size())
    )
    topks = list(dict.fromkeys(settings.topk or (run.settings.model.moe_router_topk,)))
    classifier = Classifier(len(task.labels), settings.dropout, frozenset(settings.freeze))
    engine: Any = run.open_engine(tokenizer, classifier=classifier)
    try:
        run.load_into(engine)
        session = Session(engine, parts, run.step, settings.evaluations, keep(engine))
        rows, lines, steps = list[reports.ResultRow](), list[str](), list[str]()
        chosen: dict[int, int] = {}
        total = settings.seeds * run.settings.train.train_iters
        with Bar("fine-tune", "steps") as bar:

            def tell(record: dict[str, Any]) -> None:
                steps.append(json.dumps(record) + "\n")
                if engine.place.is_main:
                    dev = [f"dev {record['dev_accuracy']:.4f}"] if "dev_accuracy" in record else []
                    bar.update(len(steps), total, ", ".join([f"loss {record['loss']:.4f}", *dev]))

            for seed in range(1, settings.seeds + 1):
                outcome = session.run(seed, topks, tell)
                chosen[seed] = outcome.chosen_step
                rows += reports.rows_of(outcome, parts)
                lines += reports.predictions_of(outcome, parts)
        if engine.place.is_main:
            for line in reports.table(rows):
                show(line)
            facts = facts_of(run, settings, task, parts) | {"chosen_steps": chosen}
            write(args.output, rows, lines, steps, facts)
    finally:
        engine.close()


def write(
    output: Path, rows: list[dict[str, Any]], lines: list[str], steps: list[str], facts: dict[str, Any]
) -> None:
    """Write the files of a fine-tuning, each atomically, the results last."""
    from megatron_hyperrouter.finetuning import reports

    try:
        write_json(output / reports.FACTS, facts)
        write_text(output / reports.PREDICTIONS, "".join(lines))
        write_text(output / reports.TRAINING, "".join(steps))
        write_json(output / reports.RESULTS, {"results": rows})
    except OSError as error:
        raise HyperRouterError(
            f"{output} cannot be written: {error.strerror or error}", remedy="free space on that disk"
        ) from error


def check_output(output: Path) -> None:
    """ConfigError if there are already results, or if they cannot be written."""
    from megatron_hyperrouter.finetuning import reports

    rule = "already has results" if (output / reports.RESULTS).exists() else ""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"cannot be created: {error.strerror or error}"
    if rule:
        raise ConfigError(
            [Problem("--output", output, rule, ("give another folder, or move this folder away"))]
        )


def facts_of(
    run: TrainedRun, settings: Settings, task: Task, parts: dict[str, TextsOfSplit]
) -> dict[str, Any]:
    """What a reader of the results needs to know."""
    return {
        "checkpoint": str(run.checkpoint),
        "step": run.step,
        "router": run.settings.router.name,
        "finetune_k": run.settings.model.moe_router_topk,
        "steps": run.settings.train.train_iters,
        "seq_length": run.settings.model.seq_length,
        "settings": asdict(settings),
        "labels": list(task.labels),
        "texts": {name: len(part) for name, part in parts.items()},
        "notes": list(task.notes),
    }


def trained_topk(run: TrainedRun) -> int:
    """The k at which training ended."""
    from megatron_hyperrouter.engines.routing import topk_schedule

    return topk_schedule(run.settings)(run.step)


def compare(first: Path, second: Path, *, output: Path | None) -> None:
    """Two fine-tunings on one task; a table, and JSON where a file is named."""
    from megatron_hyperrouter.finetuning import reports

    found = reports.compare(first, second)
    for line in reports.comparison_table(found):
        show(line)
    if output is not None:
        write_json(output, {"first": str(first), "second": str(second), "results": found})
