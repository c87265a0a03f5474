"""Examine this machine, or all machines of a job: versions, speed, network, clocks, and the run folder.

  mhr doctor                                             one process
  torchrun --nproc-per-node 8 tools/doctor.py            all GPUs of a machine
  srun -N 8 --ntasks-per-node 8 python tools/doctor.py   all GPUs of 8 machines

Run it as the first step of a job. Each line of the report is ok, a note, or a fault with its remedy.
Exit status: 0 if there is no fault, else 5.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hyperrouter.errors import HostError
from megatron_hyperrouter.terminal import counted, parser, show

if TYPE_CHECKING:
    from megatron_hyperrouter.doctor.examine import Report

_MOST_GB = 1e12  # of a checkpoint


def main(arguments: Sequence[str]) -> None:
    """Examine, show the findings, and end with the exit status."""
    flags = parser(__doc__ or "")
    flags.checks_folders = False  # a run folder that cannot be used is a finding
    add = flags.add_argument
    add("--json", type=Path, metavar="FILE", help="also write the findings to FILE as JSON")
    add(
        "--run-dir",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="run folder to test (default: the current folder)",
    )
    add(
        "--checkpoint-gb",
        type=float,
        metavar="X",
        help="size of one checkpoint in GB; the command checks that the disk has space for three "
        "checkpoints (default: the size of the newest checkpoint in the run folder)",
    )
    args = flags.parse_args(arguments)
    if args.checkpoint_gb is not None and not 0 < args.checkpoint_gb < _MOST_GB:
        rule = f"must be greater than 0 and less than {_MOST_GB:g}"
        flags.refuse("--checkpoint-gb", args.checkpoint_gb, rule, "give the size of one checkpoint in GB")
    from megatron_hyperrouter.doctor.examine import examine
    from megatron_hyperrouter.doctor.ranks import Ranks
    from megatron_hyperrouter.files import check_output
    from megatron_hyperrouter.guard.ranks import adopt_ranks
    from megatron_hyperrouter.guard.stopping import ignore_signals

    adopt_ranks()
    if args.json is not None and os.environ.get("RANK", "0") == "0":  # only this rank writes
        check_output(args.json, "--json")
    ranks = Ranks.of_this_process()
    size = None if args.checkpoint_gb is None else round(args.checkpoint_gb * 1e9)
    report = examine(ranks, args.run_dir, size)
    status = ranks.tell("status", HostError.exit_status if report.faults else 0)
    if ranks.rank == 0:
        _show(report, args.json, status)
    if status:  # a launcher ends all ranks as soon as one of them ends with a nonzero status
        ignore_signals()
    ranks.leave()
    if status:
        sys.exit(status)


def _show(report: Report, file: Path | None, status: int) -> None:
    from megatron_hyperrouter.files import write_json

    more = f" and {len(report.hosts) - 4} more" if len(report.hosts) > 4 else ""
    show(f"{counted(report.ranks, 'rank')} on {', '.join(report.hosts[:4])}{more}")
    for found in report.findings:
        level = found.level.upper() if found.level == "fault" else found.level
        show(f"{level:<6} {found.check:<12} {found.text}")
        if found.remedy:
            show(f"{'':<19} remedy: {found.remedy}")
    if file is not None:
        write_json(
            file,
            {
                "status": status,
                "ranks": report.ranks,
                "hosts": report.hosts,
                "findings": [found.as_json() for found in report.findings],
                "numbers": report.numbers,
            },
        )
    count = len(report.faults)
    show(f"{count} fault{'s' if count != 1 else ''}" if count else "no faults")
