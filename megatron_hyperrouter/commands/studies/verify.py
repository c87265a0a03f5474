"""Check that a run is the same on every layout and engine: train a few steps with each, and compare with one
process.

The model, router, optimizer and precision come from --config.  The command sets the layout and the global
batch size, switches dropout off, and trains on random tokens unless you give --own-data.  A k schedule is
shortened to the number of steps.  Adam's epsilon is raised to at least 1e-4: with a smaller epsilon, the
rounding errors of a gradient near zero would become a full step.

On one machine:
  mhr verify --config FILE.yaml
On a cluster, with one of these launchers:
  torchrun --nnodes 2 --nproc_per_node 8 tools/verify_layouts.py --config FILE.yaml
  deepspeed --hostfile hosts tools/verify_layouts.py --config FILE.yaml

Without a launcher, the command starts all ranks on this machine: on its GPUs if there is one for each rank,
else on its CPU.  Under a launcher, each layout runs on the first ranks; start as many as the largest layout
needs.
"""

from __future__ import annotations

import math
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.files import check_output, write_json
from megatron_hyperrouter.terminal import parser

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.verify.differences import Difference, Layout
    from megatron_hyperrouter.verify.start import Starter

ENGINES = ("deepspeed", "megatron")
LAYOUTS = (
    "dp=2",
    "dp=2,zero=2",
    "dp=2,use_distributed_optimizer=true",
    "ep=2",
    "tp=2",
    "pp=2",
    "pp=2,vpp=2",
    "cp=2",
    "tp=2,ep=2",
    "pp=2,ep=2",
)
EPILOG = """\
A layout is a list of sizes and settings, joined by commas: tp, pp, vpp, cp, ep, etp (expert tensor
parallelism), dp and zero (ZeRO stage), and any setting that does not change the model, by its name.  The
command runs each layout on the smallest number of ranks that its sizes allow.  tp also switches sequence
parallelism on:
  --layouts tp=2,ep=2 pp=2,vpp=2 tp=2,pp=2,ep=2 "dp=2,use_distributed_optimizer=true"
If the settings do not allow a layout, the table shows the reason.  If they allow none of the layouts that you
named, the exit status is 2.

To test this command itself, a layout can contain a deliberate fault: fault=expert-gradient,
fault=embedding-reduce, fault=aux-loss or fault=hypernetwork.

All differences are relative.  The difference of a gradient is divided by the largest gradient of the
parameter.  The difference of a weight is divided by the largest change that Adam can have made, plus 1 % of
the weight.  In float32 the tolerance is 1e-5, but 1e-4 for weights.

For a run in bfloat16, the command also trains one process in float32, to measure how much bfloat16 changes
each number.  The tolerance is twice this change, with two exceptions.  For gradients it is the change itself
(at most 0.25).  For weights it is 1.5, because a step in the opposite direction would give 2.

Exit status: 0 if all layouts agree, 1 if a difference exceeds its tolerance, 2 if the settings cannot run,
3 if the data cannot be used."""


@dataclass
class CheckedLayout:
    """One layout on one engine: its settings, or why there are none; then results."""

    layout: Layout
    engine: str
    config: RunConfig | None = None
    refused: str = ""
    folder: Path = Path()
    told: dict[str, Any] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """All differences are within their tolerances."""
        return all(difference.ok for difference in self.differences)


def main(arguments: Sequence[str]) -> None:
    """Settings of each row -> ranks -> differences from the first row -> table."""
    args = read_flags(arguments)
    from megatron_hyperrouter.verify.differences import check_names, parse_layout, samples_for

    layouts = [parse_layout(""), *(parse_layout(text) for text in dict.fromkeys(args.layouts))]
    check_names(layouts)
    check_same_model(layouts)
    check_ranks(layouts)
    engine = args.engines[0]
    samples = samples_for(layouts, settings_of(args, layouts[0], engine, samples=None).train.micro_batch_size)
    # raises ConfigError for the user's settings
    reference = CheckedLayout(layouts[0], engine, settings_of(args, layouts[0], engine, samples))
    check_data(reference, args)
    rows = [row_of(args, layout, engine, samples) for layout in layouts for engine in args.engines]
    rows = [row for row in rows if (row.layout, row.engine) != (reference.layout, reference.engine)]
    check_some_run(rows, reference)
    exact = in_float32(reference)
    starter = starter_for(args, max(row.layout.ranks for row in [reference, *rows] if row.config))
    try:
        if args.output and starter.is_main:
            check_output(args.output)
        run_all([reference, *rows, *([exact] if exact else [])], args, starter)
        if starter.is_main:
            judge(rows, reference, exact)
    finally:
        starter.close()
    if not starter.is_main:
        return
    show(rows, reference)
    if args.output:
        write_json(args.output, [record(row) for row in rows])
    if not all(row.ok for row in rows):
        sys.exit(1)


def read_flags(arguments: Sequence[str]) -> Namespace:
    """The flags of this tool."""
    flags = parser(str(__doc__), EPILOG)
    flags.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file with the settings of the run"
    )
    flags.add_argument(
        "--layouts",
        nargs="+",
        default=LAYOUTS,
        metavar="LAYOUT",
        help=f"layouts to check (see below; default: {' '.join(LAYOUTS)})",
    )
    flags.add_argument(
        "--engines",
        nargs="+",
        choices=ENGINES,
        default=ENGINES,
        help="engines to check; the first engine computes the reference (default: both engines)",
    )
    flags.add_argument(
        "--steps", type=int, default=3, metavar="N", help="number of optimizer steps in each run (default: 3)"
    )
    flags.add_argument(
        "--own-data", action="store_true", help="train on the data in --config instead of random tokens"
    )
    flags.add_argument(
        "--vocab-size",
        type=int,
        default=256,
        metavar="N",
        help="vocabulary size of the random tokens (default: 256)",
    )
    flags.add_argument(
        "--timeout",
        type=float,
        default=1800,
        metavar="S",
        help="time limit in seconds for each group of layouts with the same number of ranks (default: 1800)",
    )
    flags.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="folder for temporary weights; under a launcher, all nodes must be able to read this "
        "folder (default: runs)",
    )
    flags.add_argument(
        "--output", type=Path, metavar="FILE.json", help="also write the results to this JSON file"
    )
    args = flags.parse_args(arguments)
    args.engines = list(dict.fromkeys(args.engines))
    flags.check_at_least(args, 1, "steps")
    flags.check_at_least(args, 2, "vocab_size")
    if not args.timeout > 0:
        flags.refuse("--timeout", f"{args.timeout:g}", "must be greater than 0", "use --timeout 1800")
    return args


def check_same_model(layouts: Sequence[Layout]) -> None:
    """The weights of two models cannot be compared; raises ConfigError."""
    from megatron_hyperrouter.config.by_role import MODEL, names_with
    from megatron_hyperrouter.errors import ConfigError, Problem

    fixed = (*names_with(*MODEL), "engine")
    wrong = [
        (layout.text, name)
        for layout in layouts
        for name in layout.overrides
        if name in fixed or name.startswith("router.")
    ]
    if wrong:
        rule = "because all layouts train the same model, on each engine of --engines"
        raise ConfigError(
            [
                Problem(
                    "--layouts",
                    text,
                    f"must not set {name}, {rule}",
                    "use --engines" if name == "engine" else f"set {name} in --config",
                )
                for text, name in wrong
            ]
        )


def check_ranks(layouts: Sequence[Layout]) -> None:
    """Under a launcher the tool cannot start more ranks; raises ConfigError."""
    from megatron_hyperrouter.config.cli import launched_world_size
    from megatron_hyperrouter.errors import ConfigError, Problem

    started = launched_world_size()
    large = [layout for layout in layouts if layout.ranks > started]
    if under_launcher() and large:
        rule = f"needs more than the {started} ranks that the launcher started"
        raise ConfigError(
            [
                Problem("--layouts", layout.text, rule, f"start {layout.ranks} ranks, or give other layouts")
                for layout in large
            ]
        )


def check_some_run(rows: Sequence[CheckedLayout], reference: CheckedLayout) -> None:
    """ConfigError if the settings rule out every given layout, because nothing would be checked."""
    from megatron_hyperrouter.errors import ConfigError, Problem

    asked = [row for row in rows if row.layout != reference.layout] or rows
    if all(row.refused for row in asked):
        remedy = "give a layout that these settings allow"
        raise ConfigError(
            [Problem("--layouts", f"{row.layout.text} on {row.engine}", row.refused, remedy) for row in asked]
        )


def check_data(reference: CheckedLayout, args: Namespace) -> None:
    """Raises DataError for data that cannot be read, once, before ranks start."""
    from megatron_hyperrouter.verify.rank import read_data

    assert reference.config is not None
    read_data(reference.config, args.steps, own=args.own_data)


def under_launcher() -> bool:
    """Whether a launcher starts the ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def starter_for(args: Namespace, most_ranks: int) -> Starter:
    """What starts the ranks: this command, or a launcher."""
    from megatron_hyperrouter.verify.start import Here, Launched

    if under_launcher():
        return Launched(args.folder, timeout=args.timeout)
    return Here(args.folder, timeout=args.timeout, most_ranks=most_ranks)


def settings_of(args: Namespace, layout: Layout, engine: str, samples: int | None) -> RunConfig:
    """The user's settings on ``layout``; raises ConfigError if they cannot run there."""
    from megatron_hyperrouter.config.by_role import quiet, quiet_on
    from megatron_hyperrouter.config.cli import load_file, replace_leaves
    from megatron_hyperrouter.config.roles import Role
    from megatron_hyperrouter.routers import ROUTERS

    made_up = quiet(Role.DATA, Role.TOKENIZER) | {
        "data_path": ["made-up-tokens"],
        "tokenizer_type": "NullTokenizer",  # which adds one id, for the end of a document
        "vocab_size": args.vocab_size - 1,
    }
    overrides = (
        {"engine": engine, "global_batch_size": samples, "rampup_batch_size": None}
        | quiet(Role.START, Role.NOISE)
        | quiet_on(engine)
        | ({} if args.own_data else made_up)
    )
    config = load_file(
        args.config,
        routers=ROUTERS,
        overrides=overrides | layout.overrides,
        world_size=layout.ranks if samples else None,
    )
    if config.topk.topk_schedule != "constant" and "topk_schedule_steps" not in layout.overrides:
        config = replace_leaves(config, topk_schedule_steps=args.steps)
    return replace_leaves(config, adam_eps=max(config.optimizer.adam_eps, 1e-4))


def row_of(args: Namespace, layout: Layout, engine: str, samples: int) -> CheckedLayout:
    """A row to run, or a refused one with the reason."""
    from megatron_hyperrouter.errors import ConfigError

    try:
        return CheckedLayout(layout, engine, settings_of(args, layout, engine, samples))
    except ConfigError as error:
        return CheckedLayout(
            layout,
            engine,
            refused="; ".join(f"{problem.field}: {problem.rule}" for problem in error.problems),
        )


def in_float32(reference: CheckedLayout) -> CheckedLayout | None:
    """The reference in float32; None if it does not use bfloat16."""
    from dataclasses import replace

    from megatron_hyperrouter.config.cli import replace_leaves

    assert reference.config is not None
    return (
        replace(reference, config=replace_leaves(reference.config, bf16=False))
        if reference.config.train.bf16
        else None
    )


def run_all(rows: Sequence[CheckedLayout], args: Namespace, starter: Starter) -> None:
    """Run all rows; those with the same number of ranks share one start."""
    runnable = [row for row in rows if row.config is not None]
    for number, row in enumerate(runnable):
        row.folder = starter.folder / f"run-{number}"
        row.folder.mkdir(exist_ok=True)  # each rank of a launcher comes here
    for ranks in sorted({row.layout.ranks for row in runnable}):
        started = [row for row in runnable if row.layout.ranks == ranks]
        if starter.is_main:
            print(
                f"{len(started)} run{'s' * (len(started) > 1)} on {ranks} rank{'s' * (ranks > 1)} ...",
                file=sys.stderr,
                flush=True,
            )
        answers = starter.run([case_of(row, args, starter) for row in started], ranks)
        for row, told in zip(started, answers, strict=bool(answers)):
            row.told = told


def judge(rows: Sequence[CheckedLayout], reference: CheckedLayout, exact: CheckedLayout | None) -> None:
    """The differences of each row, and their probable causes."""
    from megatron_hyperrouter.verify.causes import causes
    from megatron_hyperrouter.verify.differences import Tolerances, compare, evidence, in_bfloat16

    assert reference.config is not None
    expected, allowed = evidence(reference.folder, reference.told), Tolerances()
    if exact is not None:
        rounding = compare(
            expected, evidence(exact.folder, exact.told), config=reference.config, allowed=allowed
        )
        allowed = in_bfloat16(rounding)
    for row in rows:
        if row.config is not None:
            found = evidence(row.folder, row.told)
            row.differences = compare(found, expected, config=row.config, allowed=allowed)
            if not row.ok:
                row.causes = causes(
                    found, expected, sizes=row.layout.sizes, tolerance=1e-3 if exact is None else 0.1
                )


def case_of(row: CheckedLayout, args: Namespace, starter: Starter) -> dict[str, Any]:
    """What the ranks read: two settings files; see ``verify.differences`` for how gradients are measured."""
    from megatron_hyperrouter.config.cli import dump, replace_leaves
    from megatron_hyperrouter.verify.differences import DROWNING_EPSILON, SCALE

    assert row.config is not None
    tells = replace_leaves(
        row.config,
        lr=SCALE * DROWNING_EPSILON,
        adam_eps=DROWNING_EPSILON,
        weight_decay=0.0,
        clip_grad=1e30 if row.config.optimizer.clip_grad else 0.0,
    )
    case: dict[str, Any] = {
        "steps": args.steps,
        "folder": str(row.folder),
        "fault": row.layout.fault,
        "own_data": args.own_data,
    }
    for name, config in (("settings", row.config), ("gradients", tells)):
        path = row.folder / f"{name}.yaml"
        if starter.is_main:
            path.write_text(dump(config), encoding="utf-8")
        case[name] = str(path)
    return case


def show(rows: Sequence[CheckedLayout], reference: CheckedLayout) -> None:
    """A table for the terminal, then what exceeds its tolerance."""
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=180)
    title = f"Largest differences between each layout and 1 process on {reference.engine}"
    table = Table(
        "layout", "ranks", "engine", "number", "difference", "tolerance", "", "seen at", title=title
    )
    for row in rows:
        head = (row.layout.text, str(row.layout.ranks), row.engine)
        if row.refused:
            table.add_row(*head, "", "", "", "refused", row.refused, style="dim", end_section=True)
        for number, found in enumerate(row.differences):
            verdict = "ok" if found.ok else "[bold red]FAIL[/]"
            values = (found.number, f"{found.value:.1e}", f"{found.tolerance:.0e}", verdict, found.where)
            table.add_row(
                *(head if number == 0 else ("", "", "")),
                *values,
                end_section=number == len(row.differences) - 1,
            )
    console.print(table)
    refused, failed = sum(bool(row.refused) for row in rows), [row for row in rows if not row.ok]
    for row in failed:
        console.print(f"[bold red]FAIL[/] {row.layout.text} on {row.engine}", highlight=False)
        for found in row.differences:
            if not found.ok:
                console.print(
                    f"  {found.number}: {found.value:.1e} > {found.tolerance:.0e}; {found.where}",
                    highlight=False,
                    soft_wrap=True,
                )
        for cause in row.causes:
            console.print(f"  [bold]probable cause:[/] {cause}", highlight=False, soft_wrap=True)
    console.print(
        (
            f"layouts: {len(rows) - refused - len(failed)} agree, {len(failed)} differ, {refused} "
            "not allowed by the settings"
        ),
        highlight=False,
    )


def record(row: CheckedLayout) -> dict[str, Any]:
    """One row for a program; JSON has no infinity and no NaN."""
    differences = [
        asdict(found)
        | {"value": found.value if math.isfinite(found.value) else str(found.value), "ok": found.ok}
        for found in row.differences
    ]
    return {
        "layout": row.layout.text,
        "ranks": row.layout.ranks,
        "engine": row.engine,
        "refused": row.refused,
        "ok": row.ok,
        "differences": differences,
        "causes": row.causes,
    }
