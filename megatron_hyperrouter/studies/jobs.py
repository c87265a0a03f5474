"""What both studies of mhr scaling share: common flags, runs on a cluster, and the choice of finished runs
for the tables.
"""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from megatron_hyperrouter.studies.runs import (
    PROGRAM,
    StudyRun,
    check_finished,
    refuse_flags,
    training,
    write_plan,
)
from megatron_hyperrouter.terminal import Parser, note, parser, show

if TYPE_CHECKING:
    from megatron_hyperrouter.config.reading.sources import CommandLine
    from megatron_hyperrouter.config.tree import RunConfig

P = TypeVar("P", bound=StudyRun)
EPILOG = """All other flags are settings of mhr train and apply to every run.

On a Slurm cluster, run the command in the folder that contains examples/, and add one of these flags:
  --dry-run | bash    writes the settings of all unfinished runs, and submits a job for each of them
  --collect           makes the tables from the runs that are finished; use it when the jobs have ended"""


def common_parser(study: str, description: str, epilog: str) -> Parser:
    """A parser with the flags of both studies."""
    flags = parser(description, f"{epilog}\n{EPILOG}")
    flags.prog = f"{flags.prog} {study}"
    flags.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file with the settings that all runs share"
    )
    flags.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for runs, tables and plots"
    )
    instead = flags.add_mutually_exclusive_group()
    instead.add_argument(
        "--dry-run",
        action="store_true",
        help="do not train; print a Slurm command for each unfinished run",
    )
    instead.add_argument(
        "--collect",
        action="store_true",
        help="do not train; make the tables from the finished runs",
    )
    flags.add_argument(
        "--gpus-per-node",
        type=int,
        default=8,
        metavar="N",
        help="with --dry-run: GPUs in each node of the cluster (default: 8)",
    )
    return flags


def read_common(
    flags: Parser, arguments: Sequence[str], counts: Sequence[str], ours: Sequence[str] = ()
) -> tuple[Namespace, CommandLine]:
    """The flags, where ``counts`` must be at least 1, and those of the program, without ``ours``."""
    from megatron_hyperrouter.config.reading.sources import read_flags

    args, rest = flags.parse_known_args(arguments)
    flags.check_at_least(args, 1, "gpus_per_node", *counts)
    line = read_flags(rest)
    refuse_flags(flags, line, ours)
    args.output = args.output.resolve()  # a job may start in another folder
    return args, line


def gather(makers: Iterable[Callable[[], RunConfig]]) -> list[RunConfig]:
    """Settings of all runs; ConfigError with every problem of all of them, each once."""
    from megatron_hyperrouter.errors import ConfigError, Problem

    made, problems = [], dict[str, Problem]()
    for make in makers:
        try:
            made.append(make())
        except ConfigError as error:
            problems |= {str(problem): problem for problem in error.problems}
    if problems:
        raise ConfigError(list(problems.values()))
    return made


def submit(plans: Sequence[tuple[StudyRun, int]], gpus_per_node: int) -> None:
    """Write the settings of all runs, and print the command that submits each; raises ConfigError."""
    from megatron_hyperrouter.errors import ConfigError, Problem

    uneven = sorted({ranks for _, ranks in plans if ranks > gpus_per_node and ranks % gpus_per_node})
    if uneven:
        rule, remedy = (
            f"must be at most --gpus-per-node = {gpus_per_node}, or divisible by it",
            ("use a multiple of --gpus-per-node, because a run uses whole nodes"),
        )
        raise ConfigError([Problem("--ranks", ranks, rule, remedy) for ranks in uneven])
    for plan, ranks in plans:
        write_plan(plan)
        nodes, gpus = max(ranks // gpus_per_node, 1), min(ranks, gpus_per_node)
        start = [
            "sbatch",
            f"--job-name={plan.folder.name}",
            f"--nodes={nodes}",
            f"--gpus-per-node={gpus}",
            "examples/cluster/slurm.sh",
        ]
        # --engine as well: examples/cluster/slurm.sh has another one
        flags = training(plan).command[len(PROGRAM) :]
        show(shlex.join([*start, *flags, "--engine", plan.config.engine.engine]))


def without_strangers(plans: Sequence[P]) -> list[P]:
    """The unfinished runs; raises ConfigError if the folder contains runs with other settings."""
    check_finished(plans)
    return [plan for plan in plans if not plan.finished]


def check_collected(plans: Sequence[P]) -> list[P]:
    """The finished runs; prints the unfinished ones, and raises ConfigError if no run is finished."""
    from megatron_hyperrouter.errors import ConfigError, Problem

    missing = [plan for plan in plans if not plan.finished]
    if len(missing) == len(plans):
        rule = f"must contain a finished run, but none of the {len(plans)} runs of this study is finished"
        raise ConfigError(
            [
                Problem(
                    "--output",
                    plans[0].folder.parent.parent,
                    rule,
                    "submit the jobs that --dry-run prints, or wait until a run is finished",
                )
            ]
        )
    for plan in missing:
        note(f"not in the tables, because the run is not finished: {plan.folder}")
    return [plan for plan in plans if plan.finished]
