"""Average checkpoints of a run into a new run folder for evaluate, generate, export-hf and train --finetune.

Name the checkpoints with --steps, or take the newest ones with --last.  The default is the plain mean;
--weights sets a factor for each checkpoint, and --ema computes an exponential moving average.
average_certificate.json in the new folder lists the averaged checkpoints and their factors.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.errors import CheckpointError, ConfigError, Problem
from megatron_hyperrouter.evaluate.trained import run_path
from megatron_hyperrouter.terminal import parser, show

if TYPE_CHECKING:
    from megatron_hyperrouter.evaluate.trained import TrainedRun
    from megatron_hyperrouter.export.averaging import Term

CERTIFICATE = "average_certificate.json"


def main(arguments: Sequence[str]) -> None:
    """Checkpoints -> one checkpoint -> a run folder."""
    args = read_flags(arguments)
    from megatron_hyperrouter.evaluate.trained import TrainedRun
    from megatron_hyperrouter.files import publish, unfinished_folder, write_json

    runs = [TrainedRun.open(folder) for folder in folders_of(args)]
    terms = terms_of(args, runs)
    with unfinished_folder(args.output) as draft:
        certificate = write(draft, args.output, runs, terms)
        write_json(draft / CERTIFICATE, certificate)
        publish(draft, args.output)
    parts = ", ".join(f"{term.weight:.4g} x step {term.step}" for term in terms)
    show(f"{args.output}: {parts}")


def folders_of(args: Namespace) -> list[Path]:
    """The requested checkpoints, oldest first."""
    from megatron_hyperrouter.checkpoint.folder import find
    from megatron_hyperrouter.checkpoint.manifest import folder_name, sealed_steps

    newest = find(args.load)
    if newest is None:
        raise CheckpointError(
            f"--load = {args.load}: the folder has no finished checkpoint",
            remedy="give the folder of a run that has saved a checkpoint",
        )
    root = newest.parent
    there = sealed_steps(root)
    if args.steps is not None:
        if missing := sorted(set(args.steps) - set(there)):
            raise CheckpointError(
                f"{root} has no checkpoint for step {missing[0]}",
                remedy=f"use steps from this list: {', '.join(map(str, there))}",
            )
        return [root / folder_name(step) for step in sorted(set(args.steps))]
    if args.last > len(there):
        rule = f"must be at most {len(there)}, the number of checkpoints in {root}"
        raise ConfigError([Problem("--last", args.last, rule, f"use --last {len(there)} or less")])
    return [root / folder_name(step) for step in there[-args.last :]]


def terms_of(args: Namespace, runs: Sequence[TrainedRun]) -> list[Term]:
    """Each checkpoint with its weight."""
    from megatron_hyperrouter.export.averaging import Term, shares
    from megatron_hyperrouter.export.sources import check_files, weight_reader

    for run in runs:
        check_files(run.checkpoint)
    if args.weights is not None and len(args.weights) != len(runs):
        rule = f"must have one weight for each of the {len(runs)} checkpoints"
        given = " ".join(map(str, args.weights))
        raise ConfigError(
            [Problem("--weights", given, rule, f"give {len(runs)} weights, oldest checkpoint first")]
        )
    weights = shares(len(runs), weights=args.weights, ema=args.ema)
    return [
        Term(run.step, weight, weight_reader(run.checkpoint))
        for run, weight in zip(runs, weights, strict=True)
    ]


def write(draft: Path, output: Path, runs: Sequence[TrainedRun], terms: Sequence[Term]) -> dict[str, Any]:
    """The new run folder; returns its certificate."""
    from megatron_hyperrouter.checkpoint.description import describe
    from megatron_hyperrouter.checkpoint.folder import CheckpointFolders
    from megatron_hyperrouter.config.cli import dump, replace_leaves
    from megatron_hyperrouter.evaluate.whereabouts import start_folder
    from megatron_hyperrouter.export.averaging import write_average
    from megatron_hyperrouter.export.sources import OneProcess, weight_reader

    last = runs[-1]
    settings = replace_leaves(last.settings, run_dir=str(output))
    described = describe(settings)
    meta = {**last.manifest["meta"], **described.meta, "averaged": [term.step for term in terms]}
    meta["origin"] |= {"folder": start_folder(settings.data, last.manifest["meta"], last.run_dir)}
    folders = CheckpointFolders(draft / "checkpoints", OneProcess())
    folder = folders.save(
        last.step, lambda folder: _ignore(write_average(folder, terms)), meta, texts=described.texts
    )
    (draft / "config.yaml").write_text(dump(settings), encoding="utf-8")
    return {
        "format": 1,
        "source": [
            {
                "run": run.run_dir.name,
                "step": term.step,
                "weight": term.weight,
                "weights_sha256": term.reader.digest(),
            }
            for run, term in zip(runs, terms, strict=True)
        ],
        "weights_sha256": weight_reader(folder).digest(),
    }


def _ignore(_value: object) -> None:
    """Ignore what a save reports: averaging needs none of it."""


def read_flags(arguments: Sequence[str]) -> Namespace:
    """The flags; a wrong one ends with status 2."""
    flags = parser(__doc__ or "")
    add = flags.add_argument
    add(
        "--load",
        type=run_path,
        required=True,
        metavar="RUN_DIR",
        help="run folder, or its checkpoints/ folder",
    )
    add("--output", type=Path, required=True, metavar="RUN", help="run folder to write")
    add("--steps", type=int, nargs="+", metavar="N", help="steps of the checkpoints to average")
    add("--last", type=int, metavar="N", help="average the newest N checkpoints")
    add(
        "--weights",
        type=float,
        nargs="+",
        metavar="W",
        help="factors of the checkpoints in the average, in order from the oldest to the newest "
        "checkpoint (default: equal factors)",
    )
    add(
        "--ema",
        type=float,
        metavar="DECAY",
        help=(
            "exponential moving average: from the newest to the oldest checkpoint, each factor is "
            "DECAY times the previous factor"
        ),
    )
    args = flags.parse_args(arguments)
    if (args.steps is None) == (args.last is None):
        flags.refuse("--steps or --last", "", "exactly one is required", "give either --steps or --last")
    flags.check_at_least(args, 1, "last")
    if args.weights is not None and args.ema is not None:
        flags.refuse("--ema", args.ema, "cannot be combined with --weights", "keep one of the two flags")
    if args.ema is not None and not 0 < args.ema < 1:
        flags.refuse("--ema", args.ema, "must be greater than 0 and less than 1", "use --ema 0.9")
    if args.weights is not None and not 0 < sum(args.weights) < math.inf:
        rule = "must have a finite sum greater than 0"
        flags.refuse("--weights", args.weights, rule, "leave out --weights for equal weights")
    return args
