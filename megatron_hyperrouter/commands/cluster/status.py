"""Show the state of a run: running, stopped, finished, failed or hung; step, speed, ETA, last save, restarts.

For the output folder of mhr compare or mhr scaling, show one line for each run that has been
prepared or started.

The command only reads files in that folder, so it works on any machine that can read it. A job
script uses --after-exit to ask whether to start the run again: exit status 0 means yes, 1 means no.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_hyperrouter.terminal import parser, show


def main(arguments: Sequence[str]) -> None:
    """Folder -> state."""
    flags = parser(__doc__ or "")
    add = flags.add_argument
    add(
        "run", type=Path, metavar="RUN", help="run folder, or the output folder of mhr compare or mhr scaling"
    )
    add("--json", action="store_true", help="print one JSON object instead of text")
    add(
        "--after-exit",
        type=int,
        metavar="STATUS",
        help="exit status of the run's launcher; the command answers whether to start the run again",
    )
    args = flags.parse_args(arguments)
    if args.after_exit is not None:
        _answer(args.run, args.after_exit)
    from megatron_hyperrouter.watch.status import status_of
    from megatron_hyperrouter.watch.study import lines_of_study, read_study
    from megatron_hyperrouter.watch.trace import read_trace
    from megatron_hyperrouter.watch.words import lines_of

    if study := read_study(args.run):
        show(json.dumps(study.as_json(), indent=2) if args.json else "\n".join(lines_of_study(study)))
        return
    status = status_of(read_trace(args.run))
    if args.json:
        show(json.dumps(status.as_json(), indent=2))
        return
    for label, text in lines_of(status):
        show(f"{label:<10} {text}")


def _answer(run_dir: Path, exit_status: int) -> None:
    """End with 0 if the run should start again, and with 1 if it should not."""
    from megatron_hyperrouter.errors import HyperRouterError
    from megatron_hyperrouter.watch.restart import worth_restarting

    try:
        yes, why = worth_restarting(run_dir, exit_status, environ=os.environ)
    except HyperRouterError as error:  # the run ended before it created its folder
        yes, why = False, error.message
    show(f"restart: {'yes' if yes else 'no'}; {why}")
    sys.exit(0 if yes else 1)
