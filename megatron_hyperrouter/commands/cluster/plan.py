"""Find the parallel layouts in which a model fits on N GPUs, fastest first. The command itself needs no GPU.

  mhr plan --config FILE.yaml --gpus 64
  mhr plan --config FILE.yaml --gpus 1024 --per-node 8 --gpu-memory 80 --dry-run 3 --json plan.json

The command predicts parameters, memory and step time of every layout that the program accepts, on both
engines, and ranks them. --dry-run K then verifies the best K layouts: it builds the real engine in one
process, without allocating tensors, and runs two steps.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hyperrouter.terminal import note, parser, show

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.planning.machine import Machine

EPILOG = """\
All other flags are settings of mhr train. The command tries all layouts, so it refuses layout settings as
flags and ignores them in --config. --engine limits the plan to one engine.

All layouts have the same global batch size (default: --micro-batch-size x --gpus). For each layout the
command also tries full recomputation, ZeRO stages, the distributed optimizer, interleaved pipeline stages
and smaller micro-batches, and shows the fastest choice that fits.

Exit status: 0 if a layout fits, 1 if none fits, 2 if the settings cannot run."""
_ASSUMED_IDS = 65_536


def main(arguments: Sequence[str]) -> None:
    """Settings -> layouts -> table."""
    args, rest = read_flags(arguments)
    from megatron_hyperrouter.compat.host_logs import silence_hosts

    silence_hosts()  # before anything of megatron-core is imported
    from megatron_hyperrouter.files import check_output, write_json
    from megatron_hyperrouter.planning.plan import Planner
    from megatron_hyperrouter.planning.start_command import start_command
    from megatron_hyperrouter.planning.table import text_of

    config, engines, named = settings_of(args.config, rest)
    planner = Planner(config, vocabulary_of(config), machine_of(args), engines)
    plan = planner.plan(args.gpus)
    if args.json is not None:  # before the dry runs, which take long
        check_output(args.json, "--json")
    if args.dry_run:
        from megatron_hyperrouter.planning.verified import verify

        verify(plan, args.dry_run, planner.vocab_size, note)
    if args.json is not None:
        write_json(args.json, plan.as_json(named))
    command = ""
    if plan.fitting:
        command = start_command(plan.fitting[0].candidate, args.config, rest, args.per_node, named)
    show(text_of(plan, top=args.top, command=command))
    if not plan.fitting:
        raise SystemExit(1)


def read_flags(arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The flags of this command, and the flags of mhr train."""
    flags = parser(str(__doc__), EPILOG)
    flags.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file with the settings of the run"
    )
    flags.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs")
    flags.add_argument("--per-node", type=int, default=8, metavar="N", help="GPUs per node (default: 8)")
    flags.add_argument(
        "--gpu-memory", type=float, default=80.0, metavar="GB", help="memory per GPU in GB (default: 80)"
    )
    flags.add_argument(
        "--dry-run",
        type=int,
        default=0,
        metavar="K",
        help="verify the K fastest layouts: for each layout, build the real engine and run two steps "
        "(default: 0)",
    )
    flags.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write all layouts, including refused layouts, to FILE as JSON",
    )
    flags.add_argument(
        "--top", type=int, default=10, metavar="N", help="number of layouts to show (default: 10)"
    )
    flags.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="JSON file with the speed of this machine, written by mhr scaling speed",
    )
    flags.add_argument(
        "--gpu-tflops",
        type=float,
        metavar="X",
        help="sustained speed of one GPU in TFLOP/s (default: 396, which is 40 %% of an H100's peak speed)",
    )
    flags.add_argument(
        "--skew",
        type=float,
        default=1.3,
        metavar="X",
        help="load of the busiest expert-parallel rank divided by the mean load (default: 1.3)",
    )
    flags.add_argument(
        "--reserve",
        type=float,
        default=2.5,
        metavar="GB",
        help="memory of each GPU to keep free for CUDA and NCCL, in GB (default: 2.5)",
    )
    args, rest = flags.parse_known_args(arguments)
    flags.check_at_least(args, 1, "gpus", "per_node", "top", "skew")
    flags.check_at_least(args, 0, "dry_run")
    if not 0 <= args.reserve < args.gpu_memory:
        rule = f"must be at least 0 and less than --gpu-memory = {args.gpu_memory:g}"
        flags.refuse("--reserve", f"{args.reserve:g}", rule, "use a smaller --reserve or larger GPUs")
    if args.gpu_tflops is not None and not args.gpu_tflops > 0:
        rule = "must be greater than 0"
        flags.refuse("--gpu-tflops", f"{args.gpu_tflops:g}", rule, "give the TFLOP/s that one GPU sustains")
    if args.gpus > args.per_node and args.gpus % args.per_node:
        rule = f"must be divisible by --per-node = {args.per_node}, because a run uses whole nodes"
        above = -(-args.gpus // args.per_node) * args.per_node
        remedy = f"use {above - args.per_node} or {above} GPUs, or change --per-node"
        flags.refuse("--gpus", args.gpus, rule, remedy)
    return args, rest


def machine_of(args: Namespace) -> Machine:
    """The machine that the flags and the calibration file describe."""
    from dataclasses import replace

    from megatron_hyperrouter.planning.machine import Machine, calibrated

    machine = Machine(
        memory=args.gpu_memory * 1e9,
        per_node=args.per_node,
        reserve=args.reserve * 1e9,
        skew=args.skew,
    )
    if args.calibration is not None:
        machine = calibrated(machine, args.calibration)
    if args.gpu_tflops is not None:
        machine = replace(machine, flops=args.gpu_tflops * 1e12, source="--gpu-tflops, " + machine.source)
    return machine


def settings_of(path: str, words: Sequence[str]) -> tuple[RunConfig, Sequence[str], Set[str]]:
    """The run without a layout, the engines to try, and the settings that the file names; raises
    ConfigError.
    """
    from dataclasses import replace

    from megatron_hyperrouter.config.by_role import names_with
    from megatron_hyperrouter.config.draft import Draft
    from megatron_hyperrouter.config.reading.sources import read_flags as program_flags
    from megatron_hyperrouter.config.reading.sources import read_yaml
    from megatron_hyperrouter.config.roles import Role
    from megatron_hyperrouter.errors import ConfigError, Problem
    from megatron_hyperrouter.planning.layouts import ENGINES
    from megatron_hyperrouter.routers import ROUTERS

    line, file = program_flags(words), read_yaml(path)
    layout = names_with(Role.LAYOUT)
    if named := [flag for flag in line.flags if flag.removeprefix("--").replace("-", "_") in layout]:
        rule = "is set by this command, which tries all layouts"
        problem = Problem(named[0], "", rule, "leave it out")
        raise ConfigError([problem])
    chosen = line.flags.get("--engine")
    values = {name: value for name, value in file.values.items() if name not in layout}
    named_data = any("data" in name and name.endswith(("data", "path", "schedule")) for name in values)
    overrides = {} if named_data or any("data" in flag for flag in line.flags) else {"mock_data": True}
    draft = Draft(
        ROUTERS, replace(file, values=values), flags=line.flags, problems=line.problems, overrides=overrides
    )
    config = draft.finish(world_size=None)
    in_file = {*draft.written} | (set(layout) & set(file.values))
    return config, (config.engine.engine,) if chosen else ENGINES, in_file


def vocabulary_of(config: RunConfig) -> int:
    """The number of token ids; --vocab-size or a guess if the tokenizer is not on this machine."""
    from megatron_hyperrouter.data.tokenize.tokenizer import tokenizer_of
    from megatron_hyperrouter.errors import DataError, HostError

    try:
        return tokenizer_of(config.data).vocab_size
    except (DataError, HostError) as error:
        ids = config.data.vocab_size or _ASSUMED_IDS
        reason = (
            "from --vocab-size"
            if config.data.vocab_size
            else "a guess; set the real number with --vocab-size N"
        )
        note(f"the tokenizer cannot be read ({error.message}); the plan uses {ids:,} token ids ({reason})")
        return ids
