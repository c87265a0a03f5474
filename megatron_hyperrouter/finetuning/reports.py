"""The rows and tables of a fine-tuning run's results, and the comparison of two runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_hyperrouter.analysis.intervals import mean_and_half
from megatron_hyperrouter.errors import DataError, HyperRouterError, reason_of
from megatron_hyperrouter.files import write_json, write_text
from megatron_hyperrouter.finetuning.measures import log_softmax, mcnemar, paired_bootstrap, scores

if TYPE_CHECKING:
    from megatron_hyperrouter.finetuning.batches import TextsOfSplit
    from megatron_hyperrouter.finetuning.session import Outcome

RESULTS, PREDICTIONS, TRAINING, FACTS = (
    "results.json",
    "predictions.jsonl",
    "training.jsonl",
    "finetuning.json",
)
_NUMBERS = ("accuracy", "macro_f1", "loss", "ece")
ResultRow = dict[str, Any]


def rows_of(outcome: Outcome, parts: dict[str, TextsOfSplit]) -> list[ResultRow]:
    """The results of one seed, as in ``results.json``."""
    return [
        {"topk": topk, "seed": outcome.seed, "split": split}
        | asdict(scores(logits_NC, parts[split].classes_N))
        for (split, topk), logits_NC in outcome.logits.items()
    ]


def predictions_of(outcome: Outcome, parts: dict[str, TextsOfSplit]) -> Iterator[str]:
    """A line for each text of the test, in the order of its file, and each k."""
    for (split, topk), logits_NC in outcome.logits.items():
        if split != "test":
            continue
        log_probs_NC = log_softmax(logits_NC)
        for index, label in enumerate(parts[split].classes_N):
            predicted = int(log_probs_NC[index].argmax())
            line: ResultRow = {"seed": outcome.seed, "topk": topk, "index": index, "label": int(label)}
            line |= {"predicted": predicted, "probability": float(np.exp(log_probs_NC[index, predicted]))}
            yield json.dumps(line) + "\n"


def folder_of(output: Path, seed: int) -> Path:
    """The folder of one seed."""
    return output / f"seed-{seed}"


def is_finished(output: Path, seed: int) -> bool:
    """Whether this attempt or an earlier one has finished the seed."""
    return (folder_of(output, seed) / RESULTS).is_file()


def write_facts(output: Path, facts: ResultRow) -> None:
    """``finetuning.json``."""
    with _reported(output):
        write_json(output / FACTS, facts)


def read_facts(output: Path) -> ResultRow:
    """``finetuning.json``; DataError if it cannot be read."""
    remedy = f"move the folder {output} away, or choose another --output"
    found = _read(output / FACTS, remedy)
    if not isinstance(found, dict):
        raise DataError(f"{output / FACTS} must contain a JSON object", remedy=remedy)
    return found


def write_seed(folder: Path, outcome: Outcome, parts: dict[str, TextsOfSplit]) -> None:
    """Write the files of one seed, or of one test, each atomically, the results last."""
    results: ResultRow = {"results": rows_of(outcome, parts)}
    with _reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / PREDICTIONS, "".join(predictions_of(outcome, parts)))
        if outcome.lines:  # a test has none
            write_text(folder / TRAINING, "".join(outcome.lines))
            results["chosen_step"] = outcome.chosen_step
        write_json(folder / RESULTS, results)


def join(output: Path, seeds: Sequence[int], facts: ResultRow) -> list[ResultRow]:
    """Write the files of a fine-tuning from those of its seeds, the results last; returns the results."""
    folders = [folder_of(output, seed) for seed in seeds]
    again = "remove the folder of this seed and run the same command again"
    found = [_read(folder / RESULTS, again) for folder in folders]
    texts = {
        name: "".join(_text(folder / name, again) for folder in folders) for name in (PREDICTIONS, TRAINING)
    }
    with _reported(output):
        for name, text in texts.items():
            write_text(output / name, text)
        chosen = {str(seed): each["chosen_step"] for seed, each in zip(seeds, found, strict=True)}
        write_json(output / FACTS, facts | {"chosen_steps": chosen})
        rows = [row for each in found for row in each["results"]]
        write_json(output / RESULTS, {"results": rows})
    return rows


def _read(path: Path, remedy: str) -> Any:
    try:
        return json.loads(_text(path, remedy))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}", remedy=remedy) from error


def _text(path: Path, remedy: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path} cannot be read: {reason_of(error)}", remedy=remedy) from error


@contextmanager
def _reported(output: Path) -> Iterator[None]:
    """Turn an OSError, such as a full disk, into a message."""
    try:
        yield
    except OSError as error:
        raise HyperRouterError(
            f"{output} cannot be written: {error.strerror or error}", remedy="free up space on that disk"
        ) from error


def table(rows: Sequence[ResultRow]) -> list[str]:
    """The test at each k: the mean over seeds, and half of its 95 % interval."""
    seeds = len({row["seed"] for row in rows})
    over = "" if seeds == 1 else f" (mean of {seeds} seeds +- half the width of the 95 % confidence interval)"
    lines = [f"test{over}", f"{'k':>4}" + "".join(f" {name:>18}" for name in _NUMBERS)]
    for topk in dict.fromkeys(row["topk"] for row in rows):
        test = [row for row in rows if row["topk"] == topk and row["split"] == "test"]
        cells = [_with_half([row[name] for row in test]) for name in _NUMBERS]
        lines.append(f"{topk:>4}" + "".join(f" {cell:>18}" for cell in cells))
    return lines


def _with_half(values: Sequence[float]) -> str:
    mean, half = mean_and_half(values)
    return f"{mean:.4f}" if half is None else f"{mean:.4f} +- {half:.4f}"


# --------------------------------------------------------------------------------------------- comparison
def compare(first: Path, second: Path) -> list[ResultRow]:
    """For each seed and k that both folders have: the accuracies, McNemar's p-value and the bootstrap
    interval of their difference.  DataError if the folders contain tests of different texts.
    """
    ours, theirs = _predictions(first), _predictions(second)
    found = list[ResultRow]()
    for key in sorted(ours.keys() & theirs.keys()):
        labels, own = ours[key]
        other_labels, other = theirs[key]
        if not np.array_equal(labels, other_labels):
            raise DataError(
                f"{first} and {second} were not tested on the same texts",
                remedy="compare fine-tuning runs on the same task folder",
            )
        own_right, other_right = own == labels, other == labels
        low, high = paired_bootstrap(own_right, other_right)
        found.append(
            {
                "seed": key[0],
                "topk": key[1],
                "first": float(own_right.mean()),
                "second": float(other_right.mean()),
                "difference": float(own_right.mean() - other_right.mean()),
                "interval": [low, high],
                "mcnemar_p": mcnemar(own_right, other_right),
            }
        )
    if not found:
        raise DataError(
            (f"{first} and {second} have no pair of seed and k in common"),
            remedy="fine-tune both models with the same --seeds and --topk",
        )
    return found


def comparison_table(found: Sequence[ResultRow]) -> list[str]:
    """The answers to two questions: do these checkpoints differ, and do the methods differ?"""
    lines = ["Do these two checkpoints differ? (bootstrap over test texts)"]
    head = ("k", "seed", "first", "second", "difference", "95 % bootstrap", "McNemar p")
    lines.append(
        f"{head[0]:>4} {head[1]:>5} {head[2]:>8} {head[3]:>8} {head[4]:>11} {head[5]:>20} {head[6]:>10}"
    )
    for row in sorted(found, key=lambda row: (row["topk"], row["seed"])):
        low, high = row["interval"]
        interval = f"{low:+.4f} to {high:+.4f}"
        lines.append(
            f"{row['topk']:>4} {row['seed']:>5} {row['first']:>8.4f} {row['second']:>8.4f} "
            f"{row['difference']:>+11.4f} {interval:>20} {row['mcnemar_p']:>10.4g}"
        )
    lines.append(
        "Do the two methods differ? (mean difference over seeds +- half the width of its 95 % "
        "confidence interval)"
    )
    for topk in dict.fromkeys(sorted(row["topk"] for row in found)):
        mean, half = mean_and_half([row["difference"] for row in found if row["topk"] == topk])
        spread = "not known from one seed" if half is None else f"+- {half:.4f}"
        lines.append(f"{topk:>4} {mean:>+.4f} {spread}")
    return lines


def _predictions(folder: Path) -> dict[tuple[int, int], tuple[Any, Any]]:
    """(seed, k) -> labels and predictions of the test."""
    path = folder / PREDICTIONS
    if not path.is_file():
        raise DataError(f"{path} is missing", remedy="use the --output folder of a fine-tuning run")
    lines: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            lines.setdefault((line["seed"], line["topk"]), []).append((line["label"], line["predicted"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                (f"{path}, line {number}: the line is not a prediction"), remedy="run mhr finetune again"
            ) from error
    return {key: (np.array(rows)[:, 0], np.array(rows)[:, 1]) for key, rows in lines.items()}
