"""Make one HTML page of plots and tables from runs and studies.

The command reads run folders; output folders of mhr compare, mhr finetune and mhr scaling; and output files
of mhr evaluate and mhr analyze.  If a run folder contains evaluation.json or analysis.json, the page includes
these files.  The page needs no network and no JavaScript, and can be printed.  The same files give the same
page, byte for byte.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron_hyperrouter.files import check_output
from megatron_hyperrouter.terminal import note, parser


def main(arguments: Sequence[str]) -> None:
    """Folders -> the page."""
    args = read_flags(arguments)
    from megatron_hyperrouter.report.build import write_report

    check_output(args.output)
    write_report(args.sources, args.output)
    note(f"written: {args.output} ({args.output.stat().st_size / 1e3:,.0f} kB)")


def read_flags(arguments: Sequence[str]) -> Namespace:
    """The flags; a wrong one ends with status 2."""
    flags = parser(str(__doc__))
    flags.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="RUN_OR_STUDY",
        help="run folders, study folders, or output files of mhr evaluate and mhr analyze",
    )
    flags.add_argument("--output", type=Path, required=True, metavar="FILE.html", help="HTML file to write")
    return flags.parse_args(arguments)
