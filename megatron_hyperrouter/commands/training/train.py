"""Pretrain a GPT-style mixture-of-experts model with any router of this project.

    deepspeed --num_nodes 8 pretrain_gpt_hyperrouter.py --config FILE.yaml [--flag value ...]   # a cluster
    torchrun --nproc_per_node 2 pretrain_gpt_hyperrouter.py --config FILE.yaml                  # any launcher
    mhr train --config FILE.yaml                                                                # one process

``bash examples/quickstart.sh`` shows the whole way from text files to a trained and evaluated model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron_hyperrouter import console

PROGRAM = "mhr train"


def main(argv: Sequence[str] | None = None) -> int:
    """Settings -> data -> engine -> training; each stage refuses what the next one could not run.

    Returns the exit status: 0, or ``STOPPED`` where the run stopped before its end on request.
    """
    from megatron_hyperrouter.guard.launcher import Launcher

    launcher = (
        Launcher.of_this_process()
    )  # before the imports: they take seconds, and the launcher may die meanwhile
    # Imported here, where console.run() turns a library that is missing into a message and an exit status.
    from megatron_hyperrouter.config.help.show import show_help_first

    words = sys.argv[1:] if argv is None else argv
    if show_help_first(words, prog=PROGRAM):
        return 0
    from megatron_hyperrouter.commands.training.dry_run_flags import asked_for

    dry, asked_world_size, words = asked_for(words)
    import torch

    from megatron_hyperrouter.commands.training.elastic import laid_out_anew
    from megatron_hyperrouter.commands.training.prepare import prepare_and_run
    from megatron_hyperrouter.config.check import warnings
    from megatron_hyperrouter.config.cli import parse
    from megatron_hyperrouter.guard.ranks import adopt_ranks
    from megatron_hyperrouter.routers import ROUTERS

    notes: list[str] = []
    adopt_ranks()
    world_size = asked_world_size or int(os.environ.get("WORLD_SIZE", "1"))
    words = laid_out_anew(words, world_size, notes)
    config = parse(words, routers=ROUTERS, world_size=world_size, notes=notes)

    def remark() -> None:
        for note in notes:
            console.note(note)
        for warning in warnings(config, has_gpu=torch.cuda.is_available(), world_size=world_size):
            console.warn(warning)

    if dry:
        from megatron_hyperrouter.commands.training.dry_run import show_run

        remark()
        show_run(config, world_size)
        return 0
    return prepare_and_run(config, world_size, launcher, remark)
