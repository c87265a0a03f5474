"""Study how the loss falls with model size and data (loss), or how the speed grows with ranks (speed).

  mhr scaling loss --config FILE --output DIR --axis hidden_size 64 128 256 --axis num_experts 4 8 16
  mhr scaling speed --config FILE --output DIR --ranks 1 2 4 --layouts "" "ep=2"

Each study has its own flags: see mhr scaling loss --help and mhr scaling speed --help.  docs/scaling.md
explains the results.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_hyperrouter.studies import loss, speed
from megatron_hyperrouter.terminal import parser


def main(arguments: Sequence[str]) -> None:
    """The first word says which study, the others are its flags."""
    flags = parser(str(__doc__))
    flags.add_argument("study", choices=("loss", "speed"), help="study to run")
    study = flags.parse_args(arguments[:1]).study
    if study == "loss":
        loss.main(arguments[1:])
    else:
        speed.main(arguments[1:])
