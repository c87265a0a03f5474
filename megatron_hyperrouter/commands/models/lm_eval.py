"""Run lm-evaluation-harness on a run or an exported folder, once for each k.

Two tasks need no download: held_out (bits per byte of texts that the model was not trained on) and next_line
(which of four lines comes next).  Their texts come from the run's test split, from the token files of
--data-path, or from --text FILE.jsonl.  All other tasks of the harness load their data from the Hugging Face
hub, unless the task files in --include-path specify another source.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_hyperrouter.errors import ConfigError, DataError, Problem, reason_of
from megatron_hyperrouter.evaluate.trained import TrainedRun, add_model_flags
from megatron_hyperrouter.files import check_output, write_json
from megatron_hyperrouter.paths import unexpanded
from megatron_hyperrouter.terminal import parser, show

_SAMPLES = 48
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def main(arguments: Sequence[str]) -> None:
    """Folder -> tasks -> the harness in a separate process -> a table."""
    args = read_flags(arguments)
    from megatron_hyperrouter.huggingface.local_tasks import TASKS
    from megatron_hyperrouter.proof.child import HARNESS, ask, require

    check_output(args.output)
    require(HARNESS, python=args.python)
    with TemporaryDirectory(prefix="mhr-lm-eval-") as name:
        home = Path(name)
        folder = folder_of(args, home)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        topks, tokenizer = topks_of(args, config), tokenizer_of(args, home, config)
        include = [] if args.include_path is None else [str(args.include_path.resolve())]
        if set(args.tasks) & set(TASKS):
            make_tasks(args, home / "tasks")
            include.append(str(home / "tasks"))
        from_hub = not set(args.tasks) <= set(TASKS)
        task = {
            "folder": str(folder.resolve()),
            "tokenizer": None if tokenizer is None else str(tokenizer),
            "topks": topks,
            "tasks": args.tasks,
            "include_path": include,
            "include_defaults": from_hub,
            "dtype": args.dtype,
            "device": args.device,
            "batch_size": args.batch_size,
            "limit": args.limit,
            "custom_code": "auto_map" in config,
        }
        answer = ask(task, python=args.python, script=HARNESS, hub=from_hub)
    if unknown := answer.get("unknown"):
        rule = "is not a task of the harness" if len(unknown) == 1 else "are not tasks of the harness"
        remedy = f"use {' or '.join(TASKS)}, or give the folder of the task's YAML file with --include-path"
        raise ConfigError([Problem("--tasks", " ".join(unknown), rule, remedy)])
    table(answer["results"])  # first: it is there even if the file cannot be written
    write_json(args.output, {"results": answer["results"], "versions": answer["versions"]})


def is_folder(load: Path) -> bool:
    """Whether it is a Hugging Face folder; else a run."""
    return (load / "config.json").is_file()


def folder_of(args: Namespace, home: Path) -> Path:
    """The Hugging Face folder, or a temporary export of the run."""
    load: Path = args.load
    if is_folder(load):
        return load
    from megatron_hyperrouter.commands.models import export_hf
    from megatron_hyperrouter.data.tokenize.transformers_files import tokenizer_json

    tokenizer = open_run(args).tokenizer()
    if tokenizer_json(tokenizer) is None:
        rule = f"was trained with a {tokenizer.type}, which the harness cannot read"
        remedy = "give a run that was trained with a HuggingFaceTokenizer or a ByteTokenizer"
        raise ConfigError([Problem("--load", load, rule, remedy)])
    folder = home / "folder"
    words = ["--load", unexpanded(load), "--output", unexpanded(folder), "--no-proof"]
    if args.tokenizer_model is not None:
        words += ["--tokenizer-model", unexpanded(args.tokenizer_model)]
    export_hf.write_folder(export_hf.read_flags(words), quiet=True, served=args.topk or ())
    return folder


def open_run(args: Namespace) -> TrainedRun:
    """The run of ``--load``."""
    return TrainedRun.open(args.load, tokenizer_model=args.tokenizer_model)


def tokenizer_of(args: Namespace, home: Path, config: dict[str, Any]) -> Path | None:
    """A folder with the tokenizer of ``--tokenizer-model``; None where the Hugging Face folder has its
    own.
    """
    if not is_folder(args.load):
        return None
    if args.tokenizer_model is None:
        if not any((args.load / name).is_file() for name in _TOKENIZER_FILES):
            rule = "has no tokenizer, which the harness needs"
            remedy = "give a tokenizer.json with --tokenizer-model FILE"
            raise ConfigError([Problem("--load", args.load, rule, remedy)])
        return None
    from megatron_hyperrouter.data.tokenize.tokenizer import build_tokenizer
    from megatron_hyperrouter.data.tokenize.transformers_files import write_tokenizer
    from megatron_hyperrouter.importing.fitting import check_rows

    tokenizer = build_tokenizer("HuggingFaceTokenizer", args.tokenizer_model, None)
    check_rows(tokenizer, args.tokenizer_model, int(config["vocab_size"]))
    folder = home / "tokenizer"
    folder.mkdir()
    write_tokenizer(folder, tokenizer, seq_length=int(config["max_position_embeddings"]))
    return folder


def topks_of(args: Namespace, config: dict[str, Any]) -> list[int]:
    """Values of k for the model of this ``config.json``; ConfigError if it has no experts, or fewer."""
    from megatron_hyperrouter.evaluate.perplexity import check_topks
    from megatron_hyperrouter.importing.source import EXPERTS

    experts = next((int(config[name]) for name in EXPERTS if name in config), None)
    if experts is None or "num_experts_per_tok" not in config:
        rule = "is not a mixture-of-experts model: config.json does not give a number of experts"
        raise ConfigError([Problem("--load", args.load, rule, "give a run or a mixture-of-experts model")])
    topks = args.topk or [int(config["num_experts_per_tok"])]
    check_topks(topks, experts, in_groups=within_groups(config, experts))
    return topks


def within_groups(config: dict[str, Any], experts: int) -> int:
    """Number of experts in the groups that a token may use, of the model of this ``config.json``."""
    own = config.get("hyperrouter") or {}
    total, chosen = own.get("groups") or (config.get("n_group") or 1, config.get("topk_group") or 1)
    if config.get("topk_method") == "greedy":  # DeepSeek-V2 then has no groups
        return experts
    return experts // int(total) * min(int(chosen), int(total))


def make_tasks(args: Namespace, folder: Path) -> None:
    """Write the files of held_out and next_line."""
    from megatron_hyperrouter.huggingface.local_tasks import write_tasks

    folder.mkdir()
    empty = write_tasks(folder, texts_of(args))
    if wrong := sorted(set(args.tasks) & set(empty)):
        raise DataError(
            f"the texts are too short for {' and '.join(wrong)}",
            remedy="give longer texts with --text FILE.jsonl; for next_line, each text needs several lines",
        )


def texts_of(args: Namespace) -> list[str]:
    """Texts that training did not see."""
    if args.text is not None:
        return list(texts_in(args.text))
    if is_folder(args.load):
        raise DataError(
            "the tasks held_out and next_line need texts, but a Hugging Face folder has none",
            remedy="add --text FILE.jsonl, or give a run folder with --load",
        )
    from megatron_hyperrouter.data.tokenize.transformers_files import end_of_text

    run = open_run(args)
    tokenizer = run.tokenizer()
    dataset = run.dataset(tokenizer, split=None if args.data_path else "test", data_path=args.data_path)
    samples = (dataset[number].tolist() for number in range(min(_SAMPLES, len(dataset))))
    eod = end_of_text(tokenizer)
    parts = (part for ids in samples for part in split_at(ids, eod))
    return [text for part in parts if (text := tokenizer.decode(part)).strip()]


def split_at(ids: Sequence[int], end: int | None) -> Iterator[list[int]]:
    """The parts of ``ids`` between the ends of documents."""
    for ends, part in groupby(ids, lambda each: each == end):
        if not ends:
            yield list(part)


def texts_in(path: Path) -> Iterator[str]:
    """The texts of a file of JSON lines; DataError names the line that has none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeError) as error:
        remedy = "give a UTF-8 file of JSON lines"
        raise DataError(f"{path} cannot be read: {reason_of(error)}", remedy=remedy) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield str(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f'{path}, line {number}: must be a JSON object with a field "text"',
                remedy="correct or remove the line",
            ) from error


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Metrics by task, with k in columns."""
    topks = sorted({row["topk"] for row in rows})
    show(f"{'task':<16} {'metric':<16}" + "".join(f"{f'k = {k}':>12}" for k in topks))
    for task in dict.fromkeys(row["task"] for row in rows):
        own = {row["topk"]: row for row in rows if row["task"] == task}
        metrics = [name for name in own[topks[0]] if name not in ("topk", "task") and "_stderr" not in name]
        for metric in metrics:
            show(
                f"{task:<16} {metric:<16}"
                + "".join(f" {cell(own[k].get(metric, float('nan'))):>11}" for k in topks)
            )


def cell(value: float) -> str:
    """A number that fits into its column."""
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def read_flags(arguments: Sequence[str]) -> Namespace:
    """The flags; a wrong one ends with status 2."""
    flags = parser(__doc__ or "")
    add_model_flags(flags)
    add = flags.add_argument
    add(
        "--tasks",
        nargs="+",
        required=True,
        metavar="NAME",
        help="tasks to run: held_out, next_line, or tasks of lm-evaluation-harness",
    )
    add("--output", type=Path, required=True, metavar="FILE.json", help="JSON file to write the results to")
    add(
        "--include-path",
        type=Path,
        metavar="DIR",
        help="folder with additional task files for lm-evaluation-harness",
    )
    add(
        "--text",
        type=Path,
        metavar="FILE.jsonl",
        help="JSON lines file with the texts for the tasks held_out and next_line (default: the "
        "run's test split)",
    )
    add(
        "--data-path",
        nargs="+",
        metavar="P",
        help="prefixes of token files with the texts for the tasks held_out and next_line (default: "
        "the run's test split)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="data type of the weights (default: float32)",
    )
    add("--device", default="cpu", help="device that runs the model, such as cuda:0 (default: cpu)")
    add(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="number of texts in one forward pass (default: 8)",
    )
    add("--limit", type=int, metavar="N", help="use only the first N texts of each task")
    add(
        "--python",
        metavar="FILE",
        help="Python interpreter with lm-eval and transformers installed (default: the interpreter "
        "that runs this command)",
    )
    args = flags.parse_args(arguments)
    flags.check_at_least(args, 1, "limit", "batch_size")
    if args.include_path is not None and not args.include_path.is_dir():
        rule = "is not a folder"
        flags.refuse("--include-path", args.include_path, rule, "name the folder of the task files")
    if args.text is not None and args.data_path is not None:
        flags.error("--text cannot be combined with --data-path")
    if args.data_path is not None and is_folder(args.load):
        flags.error(
            "--data-path works only if --load is a run folder; for a Hugging Face folder, use --text "
            "FILE.jsonl"
        )
    return args
