"""Time the same model on more and more ranks: step time, tokens per second, and efficiency relative to the
fewest ranks.

Each row of the table is a number of ranks and a layout, and runs --repeats times.  The rows take turns, so
that a slow period of the machine affects all of them.  --output gets a folder for each run, runs.csv,
table.csv and table.md (median over the steps of a run; mean over repetitions ± half the width of the 95 %
t-interval), and speed.png.  After an interruption, run the same command again to continue.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_hyperrouter.config.by_role import quiet
from megatron_hyperrouter.config.leaves import flag
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.files import write_json
from megatron_hyperrouter.processes import cores
from megatron_hyperrouter.studies.jobs import check_collected, common_parser, read_common, submit
from megatron_hyperrouter.studies.runs import (
    LAYOUT,
    RunProcess,
    StudyRun,
    check_finished,
    digest_of,
    file_values,
    filling,
    is_trained,
    read_record,
    run_all,
    training,
)

if TYPE_CHECKING:
    from megatron_hyperrouter.config.reading.sources import CommandLine
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.verify.differences import Layout

EPILOG = """\
A layout is a list of sizes and settings, joined by commas: tp, pp, vpp, cp, ep, etp, dp and zero with their
sizes, and settings by name ("" is plain data parallelism).  Each layout runs on each number of --ranks; ranks
that it does not need become data-parallel ranks.  If the settings do not allow a layout, the table shows the
reason.  Without --layouts, all runs use the layout in --config.  Without --ranks, each layout runs on the
smallest number of ranks that it needs.

--scaling weak: the global batch size grows with the number of ranks.  On the fewest ranks it is
--global-batch-size (default: one micro-batch per data-parallel rank).  --scaling strong: the global batch
size is the same for all numbers of ranks.

Columns of the table: efficiency is the number of tokens per second and rank, divided by that of the first row
in the same repetition.  The column "data wait" is the fraction of the step time in which rank 0 waits for its
batch.  In these runs, k and the learning rate are constant, nothing is evaluated, and the final checkpoint is
removed.
"""
QUIET = quiet(Role.SCHEDULE, Role.UPKEEP) | {"rampup_batch_size": None, "skip_steps": ()}
OURS = ("--train-iters", *map(flag, QUIET))


@dataclass(frozen=True)
class TimedLayout:
    """A number of ranks and a layout: its settings, or why there are none."""

    ranks: int
    layout: str
    config: RunConfig | None = None
    refused: str = ""


@dataclass(frozen=True)
class Timed(StudyRun):
    """One repetition of a row; starts again after an interruption."""

    row: TimedLayout
    number: int  # from 1

    resumes: ClassVar[bool] = False

    def stages(self) -> list[RunProcess]:
        """Train; what an interrupted run left is removed."""
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        return [training(self, self.row.ranks)]


def main(arguments: Sequence[str]) -> None:
    """Rows -> their runs, in turn -> table and plot."""
    args, line = read_flags(arguments)
    rows = rows_of(args, line)
    if not args.dry_run and not args.collect:
        check_start(max(row.ranks for row in rows if row.config))
    plans = list(plans_of(rows, args))
    check_finished(plans)
    with filling(args.output):
        finish(plans, rows, args)


def finish(plans: Sequence[Timed], rows: Sequence[TimedLayout], args: Namespace) -> None:
    """Do the runs that are missing; then write the table and the plot."""
    for plan in plans:
        settle(plan, args.warmup)
    left = [plan for plan in plans if not plan.finished]
    if args.dry_run:
        submit([(plan, plan.row.ranks) for plan in left], args.gpus_per_node)
        return
    if not args.collect:
        run_all(left, 1, ranks=max(args.ranks))
        for plan in left:
            settle(plan, args.warmup)
    from megatron_hyperrouter.studies.speed_tables import write_results

    write_results(check_collected(plans), [row for row in rows if row.refused], args)


def read_flags(arguments: Sequence[str]) -> tuple[Namespace, CommandLine]:
    """The flags of this study, and those of the program."""
    flags = common_parser("speed", str(__doc__), EPILOG)
    flags.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        metavar="N",
        help="numbers of ranks to measure (default: the smallest number that each layout needs)",
    )
    flags.add_argument(
        "--layouts",
        nargs="+",
        default=[],
        metavar="LAYOUT",
        help="layouts to measure (see below; default: the layout in --config)",
    )
    flags.add_argument(
        "--scaling",
        choices=("weak", "strong"),
        default="weak",
        help="weak: the global batch size grows with the number of ranks; strong: the global batch "
        "size is the same for all numbers of ranks (default: weak)",
    )
    flags.add_argument(
        "--steps", type=int, default=20, metavar="N", help="number of steps to time in each run (default: 20)"
    )
    flags.add_argument(
        "--warmup",
        type=int,
        default=5,
        metavar="N",
        help="number of steps to run before the timed steps (default: 5)",
    )
    flags.add_argument(
        "--repeats",
        type=int,
        default=3,
        metavar="N",
        help="number of runs for each row of the table (default: 3)",
    )
    args, line = read_common(flags, arguments, ("ranks", "steps", "warmup", "repeats"), OURS)
    if taken := [
        name for name in line.flags if args.layouts and name.removeprefix("--").replace("-", "_") in LAYOUT
    ]:
        flags.refuse(
            taken[0], "", "cannot be combined with --layouts, which sets the layout", f"leave out {taken[0]}"
        )
    if args.ranks is None and not args.layouts:
        flags.refuse("--ranks or --layouts", "", "one of the two is required", "add --ranks 1 2, for example")
    return args, line


def check_start(most: int) -> None:
    """Runs of up to ``most`` ranks have to be started by this tool, with a GPU for each rank or none;
    raises ConfigError.
    """
    from megatron_hyperrouter.errors import ConfigError, Problem

    if "RANK" in os.environ:
        remedy = "start this command without a launcher, or use --dry-run on a cluster"
        raise ConfigError(
            [
                Problem(
                    "a launcher",
                    "",
                    "must not start this command, because the command itself starts the ranks",
                    remedy,
                )
            ]
        )
    if 0 < (gpus := gpus_here()) < most:
        remedy = "use fewer ranks, hide the GPUs (CUDA_VISIBLE_DEVICES=), or use --dry-run on a cluster"
        raise ConfigError(
            [Problem("--ranks", most, f"must be at most {gpus}, the number of GPUs of this machine", remedy)]
        )


def gpus_here() -> int:
    """GPUs that ranks started here would use."""
    import torch

    return torch.cuda.device_count()


# --------------------------------------------------------------------------------------------- rows
def layouts_of(args: Namespace) -> list[Layout]:
    """The given layouts; raises ConfigError for unknown words."""
    from megatron_hyperrouter.errors import ConfigError, Problem
    from megatron_hyperrouter.verify.differences import check_names, parse_layout

    layouts = [parse_layout(text) for text in dict.fromkeys(args.layouts)]
    check_names(layouts)
    ours = {*QUIET, "train_iters", "global_batch_size"}
    taken = [(layout.text, name) for layout in layouts for name in layout.overrides if name in ours]
    taken += [(layout.text, "fault") for layout in layouts if layout.fault]
    if taken:
        raise ConfigError(
            [
                Problem("--layouts", text, f"must not set {name}", f"remove {name}=... from this layout")
                for text, name in taken
            ]
        )
    return layouts


def rows_of(args: Namespace, line: CommandLine) -> list[TimedLayout]:
    """All rows, the fewest ranks first; raises ConfigError if none can run.  Fills in ``args.ranks``."""
    from megatron_hyperrouter.errors import ConfigError

    layouts = layouts_of(args)
    pairs: list[tuple[int, str, dict[str, object]]] = []
    for layout in layouts:
        numbers = args.ranks or [layout.ranks]
        if "dp=" in layout.text.replace(" ", ""):
            numbers = [layout.ranks]
        pairs += [
            (ranks, layout.text if layout.text != "1 process" else "dp", layout.overrides)
            for ranks in dict.fromkeys(numbers)
        ]
    if not layouts:
        pairs = [(ranks, "as in --config", {}) for ranks in dict.fromkeys(args.ranks)]
    pairs.sort(key=lambda pair: pair[0])
    args.ranks = sorted({ranks for ranks, _, _ in pairs})
    base = base_batch(args, line, pairs)
    rows, errors = [], []
    for ranks, name, overrides in pairs:
        batch = base * ranks if args.scaling == "weak" else base * args.ranks[0]
        try:
            rows.append(
                TimedLayout(
                    ranks,
                    name,
                    settings_of(args, line, overrides | {"global_batch_size": batch / args.ranks[0]}, ranks),
                )
            )
        except ConfigError as error:
            errors.append(error)
            rows.append(
                TimedLayout(
                    ranks,
                    name,
                    refused="; ".join(f"{problem.field}: {problem.rule}" for problem in error.problems),
                )
            )
    if all(row.refused for row in rows):
        raise errors[0]
    return rows


def base_batch(
    args: Namespace, line: CommandLine, pairs: Sequence[tuple[int, str, dict[str, object]]]
) -> int:
    """Samples of a step on the fewest ranks; takes the flag from ``line``.  Raises ConfigError."""
    from megatron_hyperrouter.config.derived import data_parallel_size
    from megatron_hyperrouter.errors import ConfigError, Problem

    fewest = [(ranks, overrides) for ranks, _, overrides in pairs if ranks == args.ranks[0]]
    configs = [settings_of(args, line, overrides, None) for _, overrides in fewest]
    line.pop("--global-batch-size")
    given = configs[0].train.global_batch_size
    if given is None and args.scaling == "strong":
        raise ConfigError(
            [
                Problem(
                    "--global-batch-size",
                    "none",
                    "must be given with --scaling strong",
                    "add --global-batch-size",
                )
            ]
        )
    shared = max(data_parallel_size(config, args.ranks[0]) for config in configs)
    return given or configs[0].train.micro_batch_size * max(shared, 1)


def settings_of(
    args: Namespace, line: CommandLine, overrides: dict[str, object], ranks: int | None
) -> RunConfig:
    """The settings of one row; ``ranks`` None: without the rules of ranks.  Raises ConfigError."""
    from megatron_hyperrouter.config.draft import Draft
    from megatron_hyperrouter.config.reading.sources import read_yaml
    from megatron_hyperrouter.routers import ROUTERS

    file = read_yaml(args.config)
    file = replace(
        file, values=file_values(file, without=[*QUIET, "train_iters", *(LAYOUT if args.layouts else ())])
    )
    own = QUIET | {"train_iters": args.warmup + args.steps} | overrides
    return Draft(ROUTERS, file, flags=line.flags, problems=line.problems, overrides=own).finish(
        world_size=ranks
    )


def plans_of(rows: Sequence[TimedLayout], args: Namespace) -> Iterator[Timed]:
    """All runs, in turn: every second time from the last row to the first."""
    from megatron_hyperrouter.config.cli import replace_leaves

    started = (
        "under Slurm"
        if args.dry_run
        else "on GPUs of one machine"
        if gpus_here()
        else f"on {cores()} CPU cores"
    )
    for number in range(1, args.repeats + 1):
        for row in rows[:: 1 if number % 2 else -1]:
            if row.config is None:
                continue
            label = re.sub(r"[^\w.=,-]+", "_", f"ranks={row.ranks},{row.layout}")
            folder = args.output / "runs" / f"{label}-run{number}"
            task = {"settings": digest_of(row.config, {"warmup": args.warmup}), "started": started}
            yield Timed(folder, replace_leaves(row.config, run_dir=str(folder)), task, row, number)


def settle(plan: Timed, warmup: int) -> None:
    """Keep the results of a finished run, and remove its weights."""
    if plan.finished or not is_trained(plan):
        return
    lines = (plan.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    told = measures(
        [record for record in map(json.loads, lines) if "split" not in record][warmup:], plan.row.ranks
    )
    started = read_record(plan.folder / "task.json", "started")["started"]
    write_json(plan.folder / "results.json", {**told, "started": started})
    shutil.rmtree(plan.folder / "checkpoints")


def measures(steps: Sequence[dict[str, Any]], ranks: int) -> dict[str, Any]:
    """Medians over the timed steps of one run, and its peak memory."""
    step_time = statistics.median(record["step_time"] for record in steps)
    tokens = round(steps[0]["tokens_per_second"] * steps[0]["step_time"])
    memory = [value for record in steps for name, value in record.items() if name.startswith("peak_memory")]
    return {
        "tokens_per_step": tokens,
        "step_time": step_time,
        "tokens_per_second": tokens / step_time,
        "tokens_per_second_per_rank": tokens / step_time / ranks,
        "data_share": statistics.median(record["data_time"] / record["step_time"] for record in steps),
        **({"peak_memory": max(memory)} if memory else {}),
    }
