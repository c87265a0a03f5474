"""Show the state of a run: running, stopped, finished, failed or hung; step, speed, ETA, last save, restarts.

It reads the files in the run folder alone, so it works on any machine that sees the folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_hyperrouter.terminal import parser, show


def main(arguments: Sequence[str]) -> None:
    """Folder -> state."""
    flags = parser(__doc__ or "")
    flags.add_argument("run", type=Path, metavar="RUN", help="run folder")
    flags.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = flags.parse_args(arguments)
    from megatron_hyperrouter.watch.status import status_of
    from megatron_hyperrouter.watch.trace import read_trace
    from megatron_hyperrouter.watch.words import lines_of

    status = status_of(read_trace(args.run))
    if args.json:
        show(json.dumps(status.as_json(), indent=2))
        return
    for label, text in lines_of(status):
        show(f"{label:<10} {text}")
