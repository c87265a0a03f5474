"""Scaling studies: how the loss falls with model and data.

    python tools/scaling_study.py loss --config FILE --output DIR --axis hidden_size 64 128 256 --axis num_experts 4 8 16

Each study has its own flags: scaling_study.py loss --help.  docs/scaling.md says how to read the results.
"""

from __future__ import annotations

from collections.abc import Sequence

from _common import parser, run_tool


def main(arguments: Sequence[str]) -> None:
    """The first word says which study, the others are its flags."""
    flags = parser(str(__doc__))
    flags.add_argument("study", choices=("loss",), help="which study")
    flags.parse_args(arguments[:1])
    import _scaling_loss

    _scaling_loss.main(arguments[1:])


if __name__ == "__main__":
    run_tool(main)
