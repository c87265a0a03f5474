"""Write a run's weights as a megatron-core checkpoint, to continue training in Megatron-LM.

Megatron-LM then uses its own router and layers.  It reads the folder with --load (and --finetune
--no-load-optim --no-load-rng).  The export was tested with megatron-core's GPTModel, built from Transformer
Engine layers.  The router is exported as a plain matrix; for a HyperRouter, this is the matrix that the
hypernetwork generates.  The command prints the folder and Megatron-LM's flags for the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_hyperrouter.evaluate.trained import TrainedRun, add_run_flags
from megatron_hyperrouter.terminal import parser


def main(arguments: Sequence[str]) -> None:
    """Settings of the run -> megatron-core's own model with its weights -> files."""
    flags = parser(__doc__ or "")
    add_run_flags(flags, data=False)
    flags.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="folder to write the checkpoint to"
    )
    args = flags.parse_args(arguments)
    from megatron_hyperrouter.compat.host_logs import silence_hosts
    from megatron_hyperrouter.compat.versions import check

    run = TrainedRun.open(args.load, tokenizer_model=args.tokenizer_model)
    silence_hosts()
    check("megatron")
    from megatron_hyperrouter.engines.megatron.single_process import one_process
    from megatron_hyperrouter.export.megatron import export_weights, model_flags

    with one_process(run.settings):
        target = export_weights(run.settings, run.checkpoint, args.output, step=run.step)
    print(f"{target}\n{' '.join(model_flags(run.settings))}")
