"""Prove that a run is the same on every layout and engine: trains a few steps on each and compares with one process.

The model, router, optimizer and precision are those of --config; the layout, the global batch and the tokens (made up) are the
tool's, dropout is off, a k schedule runs to its end within the steps, and Adam's epsilon is at least 1e-4 (below, rounding noise in
a gradient of almost nothing becomes a whole step).  All ranks run on this machine, on its GPUs where it has one for each.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import parser, run_tool

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.evaluate.layouts import Difference, Layout

WORKER = Path(__file__).with_name("_layout_rank.py")
LAYOUTS = ("dp=2", "ep=2", "tp=2", "pp=2", "cp=2", "tp=2,ep=2")
EPILOG = """A layout: tp, pp, vpp, cp, ep, etp (expert-tensor), dp, zero with their sizes, and settings by name, joined by commas:
  --layouts tp=2,ep=2 pp=2,vpp=2 "dp=2,use_distributed_optimizer=true"
For tests of this tool a layout may seed a fault: fault=expert-gradient, embedding-reduce, aux-loss or hypernetwork.

Differences are relative: of a parameter's gradients to the largest of them, of weights to the path that Adam can
have gone and a hundredth of the weight.
Exit status: 0 all agree, 1 a difference exceeds its tolerance, 2 settings that cannot run on one process.  A layout that the
settings rule out is shown with the reason, and is no failure."""


@dataclass
class Row:
    """One layout on one engine: its settings, or why there are none; then what was found."""

    layout: Layout
    engine: str
    config: RunConfig | None = None
    refused: str = ""
    folder: Path = Path()
    told: dict[str, Any] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing speaks against it."""
        return all(difference.ok for difference in self.differences)


def main(arguments: Sequence[str]) -> None:
    """Settings of each row -> ranks -> differences from the first row -> table."""
    args = read_flags(arguments)
    from megatron_hyperrouter.evaluate.layouts import compare, evidence, parse_layout, samples_for, tolerances

    layouts = [parse_layout(""), *(parse_layout(text) for text in args.layouts)]
    check_faults(layouts)
    check_alone()
    samples = samples_for(layouts, settings_of(args, layouts[0], args.engines[0], samples=None).train.micro_batch_size)
    reference = Row(layouts[0], args.engines[0], settings_of(args, layouts[0], args.engines[0], samples))  # its ConfigError is the user's
    rows = [row_of(args, layout, engine, samples) for layout in layouts for engine in args.engines]
    rows = [row for row in rows if (row.layout, row.engine) != (reference.layout, reference.engine)]
    with tempfile.TemporaryDirectory(prefix="verify_layouts-") as folder:
        run_all([reference, *rows], args, Path(folder))
        expected = evidence(reference.folder, reference.told)
        for row in rows:
            if row.config is not None:
                allowed = tolerances(bf16=row.config.train.bf16)
                row.differences = compare(evidence(row.folder, row.told), expected, config=row.config, allowed=allowed)
    show(rows, reference)
    if args.output:
        args.output.write_text(json.dumps([record(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    if not all(row.ok for row in rows):
        sys.exit(1)


def read_flags(arguments: Sequence[str]) -> Namespace:
    """The flags of this tool."""
    flags = parser(str(__doc__), EPILOG)
    flags.add_argument("--config", required=True, metavar="FILE", help="settings of the run (YAML)")
    flags.add_argument("--layouts", nargs="+", default=LAYOUTS, metavar="LAYOUT", help=f"default: {' '.join(LAYOUTS)}")
    flags.add_argument("--engines", nargs="+", choices=("deepspeed", "megatron"), default=("deepspeed", "megatron"))
    flags.add_argument("--steps", type=int, default=3, help="optimizer steps of each run (default: 3)")
    flags.add_argument("--vocab-size", type=int, default=256, help="made-up tokens are below this (default: 256)")
    flags.add_argument("--timeout", type=float, default=1800, help="seconds for all runs of one number of ranks (default: 1800)")
    flags.add_argument("--output", type=Path, metavar="JSON", help="also write what was found to this file")
    args = flags.parse_args(arguments)
    if args.steps < 1 or args.vocab_size < 2:
        flags.error("--steps must be 1 or more, --vocab-size 2 or more")
    return args


def check_faults(layouts: Sequence[Layout]) -> None:
    """A fault that nobody knows would pass for one that nothing has found; raises ConfigError."""
    from _layout_faults import FAULTS

    from megatron_hyperrouter.errors import ConfigError, Problem

    unknown = [layout.text for layout in layouts if layout.fault and layout.fault not in FAULTS]
    if unknown:
        raise ConfigError([Problem("--layouts", text, "no such fault", f"seed one of {', '.join(FAULTS)}") for text in unknown])


def check_alone() -> None:
    """Under a launcher each rank would start all ranks; raises ConfigError."""
    from megatron_hyperrouter.config.cli import launched_world_size
    from megatron_hyperrouter.errors import ConfigError, Problem

    if (ranks := launched_world_size()) > 1:
        raise ConfigError(
            [Problem("ranks started", ranks, "this tool starts its ranks itself", "start it once on one machine, without a launcher")]
        )


def settings_of(args: Namespace, layout: Layout, engine: str, samples: int | None) -> RunConfig:
    """The user's settings on ``layout``; raises ConfigError where they cannot run there."""
    from megatron_hyperrouter.config.cli import load_file, replace_leaves
    from megatron_hyperrouter.routers import ROUTERS

    overrides: dict[str, object] = {
        "engine": engine,
        "data_path": ["made-up-tokens"],
        "train_data_path": [],
        "valid_data_path": [],
        "test_data_path": [],
        "tokenizer_type": "NullTokenizer",
        "tokenizer_model": None,
        "vocab_size": args.vocab_size,
        "load": None,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "global_batch_size": samples,
        "topk_schedule_steps": args.steps,
        **(NOT_OF_DEEPSPEED if engine == "deepspeed" else NOT_OF_MEGATRON),
    }
    config = load_file(args.config, routers=ROUTERS, overrides=overrides | layout.overrides, world_size=layout.ranks if samples else None)
    return replace_leaves(config, adam_eps=max(config.optimizer.adam_eps, 1e-4))


# Settings of the other engine, which this one refuses
NOT_OF_DEEPSPEED: Mapping[str, object] = {
    "use_distributed_optimizer": False,
    "overlap_grad_reduce": False,
    "overlap_param_gather": False,
    "moe_token_dispatcher_type": "alltoall",
    "transformer_impl": "auto",
}
NOT_OF_MEGATRON: Mapping[str, object] = {"zero_stage": 1, "deepspeed_config": None}


def row_of(args: Namespace, layout: Layout, engine: str, samples: int) -> Row:
    """A row to run, or one that is refused."""
    from megatron_hyperrouter.errors import ConfigError

    try:
        return Row(layout, engine, settings_of(args, layout, engine, samples))
    except ConfigError as error:
        return Row(layout, engine, refused="; ".join(f"{problem.field}: {problem.rule}" for problem in error.problems))


def run_all(rows: Sequence[Row], args: Namespace, folder: Path) -> None:
    """All rows with as many ranks run in one start of those ranks."""
    on_gpus = enough_gpus(max(row.layout.ranks for row in rows))
    runnable = [row for row in rows if row.config is not None]
    for number, row in enumerate(runnable):
        row.folder = folder / f"run-{number}"
        row.folder.mkdir()
    for ranks in sorted({row.layout.ranks for row in runnable}):
        started = [row for row in runnable if row.layout.ranks == ranks]
        print(f"{len(started)} runs on {ranks} rank{'s' * (ranks > 1)} ...", file=sys.stderr, flush=True)
        answers = run_ranks([case_of(row, args.steps) for row in started], ranks, folder, timeout=args.timeout, on_gpus=on_gpus)
        for row, told in zip(started, answers, strict=True):
            row.told = told


def case_of(row: Row, steps: int) -> dict[str, Any]:
    """What the ranks read: two settings files, see ``evaluate.layouts`` for how gradients are told."""
    from megatron_hyperrouter.config.cli import dump, replace_leaves
    from megatron_hyperrouter.evaluate.layouts import DROWNING_EPSILON, SCALE

    assert row.config is not None
    tells = replace_leaves(
        row.config,
        lr=SCALE * DROWNING_EPSILON,
        adam_eps=DROWNING_EPSILON,
        weight_decay=0.0,
        clip_grad=1e30 if row.config.optimizer.clip_grad else 0.0,
    )
    case = {"steps": steps, "folder": str(row.folder), "fault": row.layout.fault}
    for name, config in (("settings", row.config), ("gradients", tells)):
        path = row.folder / f"{name}.yaml"
        path.write_text(dump(config), encoding="utf-8")
        case[name] = str(path)
    return case


def enough_gpus(ranks: int) -> bool:
    """A GPU for each rank; otherwise all runs are on the CPU, so that they can be compared."""
    import torch

    return torch.cuda.is_available() and torch.cuda.device_count() >= ranks


def run_ranks(cases: Sequence[dict[str, Any]], ranks: int, folder: Path, *, timeout: float, on_gpus: bool) -> list[dict[str, Any]]:
    """Start ``ranks`` processes, wait, and return what rank 0 told; the end of a failed rank's log is the error."""
    task, answer = folder / f"task-{ranks}.json", folder / f"answer-{ranks}.json"
    task.write_text(json.dumps({"name": f"ranks-{ranks}", "cases": cases}), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONWARNINGS": "ignore"}
    common.setdefault("OMP_NUM_THREADS", "1")
    if not on_gpus:
        common["CUDA_VISIBLE_DEVICES"] = ""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            with (folder / f"log-{ranks}-{rank}").open("wb") as log:
                command = [sys.executable, str(WORKER), str(task), str(answer)]
                own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True))
        wait(processes, time.monotonic() + timeout)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    codes = [process.returncode for process in processes]
    if any(codes):
        # A rank that was left alone fails as well, but later: it says less than the one that fell first
        guilty = next((rank for rank, code in enumerate(codes) if code > 0), 0)
        tail = (folder / f"log-{ranks}-{guilty}").read_text(encoding="utf-8", errors="replace")[-3000:]
        raise RuntimeError(f"exit statuses of the {ranks} ranks: {codes}\n--- end of rank {guilty}'s log\n{tail}")
    told: list[dict[str, Any]] = json.loads(answer.read_text(encoding="utf-8"))
    return told


def wait(processes: Sequence[subprocess.Popen[bytes]], end: float) -> None:
    """Until all have ended, one has failed, or the time is over."""
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if all(code is not None for code in codes) or any(codes):
            return
        time.sleep(0.1)


def show(rows: Sequence[Row], reference: Row) -> None:
    """A table for a person, then what exceeds its tolerance."""
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=180)
    title = f"Largest differences from 1 process on {reference.engine}"
    table = Table("layout", "ranks", "engine", "number", "difference", "tolerance", "", "seen at", title=title)
    for row in rows:
        head = (row.layout.text, str(row.layout.ranks), row.engine)
        if row.refused:
            table.add_row(*head, "", "", "", "refused", row.refused, style="dim", end_section=True)
        for number, found in enumerate(row.differences):
            verdict = "ok" if found.ok else "[bold red]FAIL[/]"
            values = (found.number, f"{found.value:.1e}", f"{found.tolerance:.0e}", verdict, found.where)
            table.add_row(*(head if number == 0 else ("", "", "")), *values, end_section=number == len(row.differences) - 1)
    console.print(table)
    refused, failed = sum(bool(row.refused) for row in rows), [row for row in rows if not row.ok]
    for row in failed:
        console.print(f"[bold red]FAIL[/] {row.layout.text} on {row.engine}", highlight=False)
        for found in row.differences:
            if not found.ok:
                console.print(
                    f"  {found.number}: {found.value:.1e} > {found.tolerance:.0e}; {found.where}", highlight=False, soft_wrap=True
                )
    console.print(f"{len(rows) - refused - len(failed)} agree, {len(failed)} differ, {refused} refused by the settings", highlight=False)


def record(row: Row) -> dict[str, Any]:
    """One row for a program; JSON has no infinity and no NaN."""
    differences = [
        asdict(found) | {"value": found.value if math.isfinite(found.value) else str(found.value), "ok": found.ok}
        for found in row.differences
    ]
    return {
        "layout": row.layout.text,
        "ranks": row.layout.ranks,
        "engine": row.engine,
        "refused": row.refused,
        "ok": row.ok,
        "differences": differences,
    }


if __name__ == "__main__":
    run_tool(main)
