"""Train a grid of models with several seeds, score them, and fit L = E + A / N^alpha + B / D^beta.

--output gets a folder for each run, runs.csv (one row per run), table.csv and table.md (mean over seeds ±
half the width of the 95 % t-interval), fit.json and scaling.png.  After an interruption, run the same command
again: finished runs are kept, the others continue from their last checkpoint (--save-interval), and the fit
is repeated.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.paths import unexpanded
from megatron_hyperrouter.studies.jobs import (
    check_collected,
    common_parser,
    gather,
    read_common,
    submit,
    without_strangers,
)
from megatron_hyperrouter.studies.runs import (
    LAYOUT,
    OURS,
    RunProcess,
    StudyRun,
    digest_of,
    file_values,
    filling,
    is_trained,
    on_ranks,
    read_record,
    run_all,
    training,
)
from megatron_hyperrouter.terminal import note

if TYPE_CHECKING:
    from megatron_hyperrouter.config.reading.sources import CommandLine
    from megatron_hyperrouter.config.tree import RunConfig

EPILOG = """\
An axis is a setting with its values.  Several settings, joined by commas, change together:
  --axis hidden_size,moe_ffn_hidden_size 64,96 128,192 --axis train_iters 500 1000 2000
  --axis router.name topk hyper
With --axes, a YAML file defines the axes.  An axis is a list of values, or a list of settings that change
together:
  width:
    - {hidden_size: 64, moe_ffn_hidden_size: 96}
    - {hidden_size: 128, moe_ffn_hidden_size: 192}
  num_experts: [4, 8, 16]

N is the number of trainable parameters.  --size active counts only the parameters that one token uses with
k experts; it counts the input embedding only if this is also the output matrix.  D is the number of training
tokens.

FLOPs are an estimate: 6 per active parameter and token, at the k of each step, plus 12 per attention channel
and visible position (on average (S + 1) / 2 positions, for a sequence length of S).  The estimate does not
include recomputed activations, the optimizer, and additional computation of a router (such as competitions).

The command fits one curve to each group of runs with the same values of the --curve-for axes.  The curve has
a term for N if N varies, and a term for D if D varies.  A fit needs runs of more different sizes than the
curve has parameters.  The intervals contain 95 % of the curves that are fitted to resampled residuals.
"""
SIZES = ("active", "total")


@dataclass(frozen=True)
class Trained(StudyRun):
    """One model of the grid with one seed."""

    point: Mapping[str, Any]  # the settings of its axes
    seed: int
    ranks: int

    def stages(self) -> list[RunProcess]:
        """Train, and score what was trained to its end."""
        words = [
            "--load",
            unexpanded(self.folder),
            "--output",
            unexpanded(self.folder / "results.json"),
            "--split",
            self.task["split"],
        ]
        words += ["--topk", *map(str, self.task["topk"])]
        words += ["--eval-iters", str(self.task["iters"])] if self.task["iters"] else []
        scoring = RunProcess(
            "scoring", on_ranks(["-m", "megatron_hyperrouter", "evaluate", *words], self.ranks)
        )
        return [scoring] if is_trained(self) else [training(self, self.ranks), scoring]


def main(arguments: Sequence[str]) -> None:
    """Grid -> the runs -> table, fit and plot."""
    args, line = read_flags(arguments)
    from megatron_hyperrouter.studies.loss_tables import obstacles, write_results

    plans = list(plans_of(args, line))
    left = without_strangers(plans)
    for reason in obstacles(plans, args):
        note(f"note: the study will not fit a curve, because {reason}")
    with filling(args.output):
        if args.dry_run:
            submit([(plan, plan.ranks) for plan in left if not is_trained(plan)], args.gpus_per_node)
            return
        run_all([plan for plan in left if not args.collect or is_trained(plan)], args.jobs, ranks=args.ranks)
        write_results([(plan, results_of(plan)) for plan in check_collected(plans)], args)


def read_flags(arguments: Sequence[str]) -> tuple[Namespace, CommandLine]:
    """The flags of this study, and those of the program."""
    flags = common_parser("loss", str(__doc__), EPILOG)
    add = flags.add_argument
    add(
        "--axis",
        nargs="+",
        action="append",
        default=[],
        metavar="WORD",
        help="an axis of the grid: a setting and its values (see below)",
    )
    add("--axes", metavar="FILE", help="YAML file that defines the axes of the grid (see below)")
    add(
        "--seeds",
        type=int,
        default=3,
        metavar="N",
        help="number of seeds; each model is trained once with each of the seeds --seed, --seed + 1, "
        "... (default: 3)",
    )
    add(
        "--topk-eval",
        type=int,
        nargs="+",
        metavar="K",
        help="values of k (active experts per token) at which to score each model (default: the "
        "final k of training)",
    )
    add(
        "--score",
        choices=("test", "valid"),
        default="test",
        help="split of the data to score (default: test)",
    )
    add(
        "--score-iters",
        type=int,
        metavar="N",
        help="number of global batches to score; runs with different seeds score different batches "
        "(default: the whole split)",
    )
    add(
        "--size",
        choices=SIZES,
        default="active",
        help="which parameters to count as N. active: the parameters that one token uses; total: all "
        "parameters (default: active)",
    )
    add(
        "--curve-for",
        nargs="+",
        default=[],
        metavar="SETTING",
        help="fit a separate curve for each value of these axes; axes with values that are not "
        "numbers always get separate curves",
    )
    add(
        "--resamples",
        type=int,
        default=1000,
        metavar="N",
        help="number of curves to fit to resampled residuals; these curves give the 95 %% intervals "
        "(default: 1000)",
    )
    add("--jobs", type=int, default=1, metavar="N", help="number of simultaneous runs (default: 1)")
    add(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="number of ranks of each run; with 1 rank, the layout settings in --config are ignored "
        "(default: 1)",
    )
    args, line = read_common(
        flags, arguments, ("seeds", "topk_eval", "score_iters", "resamples", "jobs", "ranks")
    )
    args.curve_for = [name.replace("-", "_") for name in args.curve_for]
    return args, line


# --------------------------------------------------------------------------------------------- grid
def plans_of(args: Namespace, line: CommandLine) -> Iterator[Trained]:
    """All runs, seed by seed, with settings that were checked; raises ConfigError."""
    from megatron_hyperrouter.config.cli import replace_leaves
    from megatron_hyperrouter.config.leaves import value_of
    from megatron_hyperrouter.errors import ConfigError
    from megatron_hyperrouter.evaluate.perplexity import check_topks

    axes = axes_of(args, line)
    chosen = [
        {name: value for part in parts for name, value in part.items()} for parts in product(*axes.values())
    ]
    configs = gather(partial(settings_of, args, point, line) for point in chosen)
    for config in configs if args.topk_eval else ():
        check_topks(args.topk_eval, config.model.num_experts, router=config.router, flag="--topk-eval")
    labels = [label_of(parts) for parts in product(*axes.values())]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ConfigError(
            [
                _bad(
                    "--axis",
                    ", ".join(twice),
                    "would be the name of several run folders",
                    (
                        "give the first setting of each axis different values, because they name the run "
                        "folder (hidden_size in --axis hidden_size,moe_ffn_hidden_size)"
                    ),
                )
            ]
        )
    points = [
        {name: value_of(config, name) for name in point}
        for point, config in zip(chosen, configs, strict=True)
    ]
    if same := [label for number, label in enumerate(labels) if points.count(points[number]) > 1]:
        raise ConfigError(
            [_bad("--axis", ", ".join(same), "would be the same model", "give each model different values")]
        )
    for number in range(args.seeds):
        for label, point, config in zip(labels, points, configs, strict=True):
            seed = config.train.seed + number
            folder = args.output / "runs" / f"{label}-seed{seed}"
            scored = {
                "topk": args.topk_eval or [config.model.moe_router_topk],
                "split": args.score,
                "iters": args.score_iters,
            }
            task = {"settings": digest_of(replace_leaves(config, seed=seed), scored), **scored}
            yield Trained(
                folder, replace_leaves(config, seed=seed, run_dir=str(folder)), task, point, seed, args.ranks
            )


def axes_of(args: Namespace, line: CommandLine) -> dict[str, list[dict[str, Any]]]:
    """Axis -> the settings of each of its values; raises ConfigError."""
    from megatron_hyperrouter.errors import ConfigError

    axes = read_axes(args.axes)
    twice = []
    for name, *words in args.axis:
        names = [each.replace("-", "_") for each in name.split(",")]
        rows = [word.split(",") if len(names) > 1 else [word] for word in words]
        if odd := next((row for row in rows if len(row) != len(names)), None):
            raise ConfigError(
                [
                    _bad(
                        "--axis",
                        ",".join(odd),
                        f"must have {len(names)} values, one for each setting of {name}",
                        "separate them with commas",
                    )
                ]
            )
        twice += names if name in axes else []
        axes[name] = [dict(zip(names, row, strict=True)) for row in rows]
    settings = [name for values in axes.values() for name in (values[0] if values else {})]
    known = {flag.removeprefix("--").replace("-", "_") for flag in line.flags}
    problems = []
    if not axes:
        problems.append(_bad("--axis", "", "is missing", "add --axis with a setting and its values"))
    for name, values in axes.items():
        if len(values) < 2 or not values[0] or any(value.keys() != values[0].keys() for value in values):
            problems.append(
                _bad(
                    "--axis",
                    name,
                    "must have at least two values, and each value must set the same settings",
                    "write, for example, --axis hidden_size 64 128",
                )
            )
    for name in dict.fromkeys(settings):
        if settings.count(name) > 1 or name in known or name in twice:
            problems.append(
                _bad("--axis", name, "is set more than once", "set it with only one axis or flag")
            )
        if name == "seed" or f"--{name.replace('_', '-')}" in OURS:
            problems.append(
                _bad(
                    "--axis",
                    name,
                    "is set by this command",
                    "remove this axis; --seeds sets the number of seeds",
                )
            )
    problems += [
        _bad(
            "--curve-for",
            name,
            "is not a setting of any --axis",
            f"use {', '.join(settings) or 'a setting of --axis'}",
        )
        for name in args.curve_for
        if name not in settings
    ]
    if problems:
        raise ConfigError(problems)
    return axes


def read_axes(path: str | None) -> dict[str, list[dict[str, Any]]]:
    """``--axes``; raises ConfigError."""
    from megatron_hyperrouter.config.reading.yaml_text import load_yaml, why_not
    from megatron_hyperrouter.errors import ConfigError

    if path is None:
        return {}
    try:
        found = load_yaml(path)
    except (OSError, ValueError) as error:
        raise ConfigError([_bad("--axes", path, why_not(error), "correct the YAML file")]) from error
    if not isinstance(found, dict) or not all(isinstance(values, list) for values in found.values()):
        raise ConfigError(
            [_bad("--axes", path, "must map axes to lists", "write lines such as num_experts: [4, 8]")]
        )
    return {
        str(axis): [
            value if isinstance(value, dict) else {str(axis).replace("-", "_"): value} for value in values
        ]
        for axis, values in found.items()
    }


def settings_of(args: Namespace, point: Mapping[str, Any], line: CommandLine) -> RunConfig:
    """The settings of one model of the grid; raises ConfigError."""
    from megatron_hyperrouter.config.draft import Draft
    from megatron_hyperrouter.config.reading.sources import YamlFile, read_yaml
    from megatron_hyperrouter.routers import ROUTERS

    file = read_yaml(args.config)
    values = file_values(file, without=LAYOUT if args.ranks == 1 else ())
    if "router.name" in point and point["router.name"] != values.get("router.name", "hyper"):
        values = {name: value for name, value in values.items() if not name.startswith("router.")}
    values |= point
    changed = YamlFile(f"{args.config} or --axis", values, file.problems, file.readable)
    overrides = (
        {} if "keep_checkpoints" in values or "--keep-checkpoints" in line.flags else {"keep_checkpoints": 1}
    )
    draft = Draft(ROUTERS, changed, flags=line.flags, problems=line.problems, overrides=overrides)
    return draft.finish(world_size=args.ranks)


def label_of(parts: Sequence[Mapping[str, Any]]) -> str:
    """What the folder of a model is called: the first setting of each axis and its value."""
    words = [f"{name}={value}" for name, value in (next(iter(part.items())) for part in parts)]
    return re.sub(r"[^\w.=,-]+", "_", ",".join(words))


def results_of(plan: Trained) -> dict[str, Any]:
    """The row of one finished run: settings of its axes, sizes, work, seconds and losses."""
    from megatron_hyperrouter.analysis.size import size_of
    from megatron_hyperrouter.checkpoint.weights import weight_shapes
    from megatron_hyperrouter.evaluate.trained import TrainedRun

    size = size_of(plan.config, weight_shapes(TrainedRun.open(plan.folder).checkpoint))
    lines = (plan.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if "split" not in record]
    results = read_record(plan.folder / "results.json", "results")["results"]
    return {
        **plan.point,
        "seed": plan.seed,
        "parameters_total": size.total,
        "parameters_active": size.active(plan.config.model.moe_router_topk),
        "tokens": steps[-1]["consumed_tokens"],
        "flops": float(size.training_flops(steps)),
        "seconds": sum(record.get("step_time", 0.0) for record in steps),  # a skipped step has none
        "scores": [row | {"active": size.active(row["topk"]), "total": size.total} for row in results],
    }


def _bad(field: str, value: object, rule: str, remedy: str) -> Any:
    from megatron_hyperrouter.errors import Problem

    return Problem(field, value, rule, remedy)
