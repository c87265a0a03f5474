"""Trains: opens the engine, prints the start block, runs the loop."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from megatron_hyperrouter import console
from megatron_hyperrouter.analysis.size import size_of
from megatron_hyperrouter.commands.training.description import description_of
from megatron_hyperrouter.commands.training.start_block import start_block
from megatron_hyperrouter.commands.training.throughput import peak_flops
from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer
from megatron_hyperrouter.engines import open_engine
from megatron_hyperrouter.errors import STOPPED
from megatron_hyperrouter.guard.launcher import Launcher
from megatron_hyperrouter.guard.stopping import ignore_signals
from megatron_hyperrouter.guard.supervision import Supervision
from megatron_hyperrouter.train.loop import train
from megatron_hyperrouter.train.reporters import hooks_for, writer_of
from megatron_hyperrouter.train.resuming.start import Start, settings_again, settings_for_state
from megatron_hyperrouter.train.run import Speed
from megatron_hyperrouter.train.samples import Samples

if TYPE_CHECKING:
    from megatron_hyperrouter.guard.events import Fact


def run(
    samples: Samples,
    tokenizer: Tokenizer,
    start: Start,
    launcher: Launcher,
    *,
    eod: int | None,
    epoch: int,
    opening: Mapping[str, Fact],
) -> int:
    """Train; returns the exit status.

    ``eod``: the id that ends a document, where the settings need it; ``epoch``: tokens of the training data;
    ``opening``: the fields of this attempt's first event.
    """
    config = samples.config
    again = settings_again(config, start)
    described = description_of(samples, tokenizer, again)
    supervision = Supervision(launcher)
    engine = open_engine(settings_for_state(config, start), vocab_size=tokenizer.vocab_size, eod=eod)
    size = size_of(config, engine.shapes())
    console.table(start_block(config, size, world_size=engine.place.world_size, epoch=epoch))
    bytes_V = tokenizer.token_bytes_V()
    steps = train(
        engine,
        config,
        samples.splits,
        hooks_for(again, engine.place, opening),
        token_bytes_V=None if bytes_V is None else torch.from_numpy(bytes_V),
        supervision=supervision,
        speed=Speed(size.flops, peak_flops(bf16=config.train.bf16)),
        description=described,
        start=start,
        writer=writer_of(config, tokenizer),
    )
    stopped = steps < config.train.train_iters
    if stopped:  # a launcher ends all ranks as soon as one of them ends with a nonzero status
        ignore_signals()
        engine.barrier()
    elif engine.place.is_main:
        folder = shlex.quote(config.logging.run_dir.replace("$", "$$"))  # reading expands variables
        console.note(
            f"finished; to make a page of plots, run: mhr report {folder} --output {folder}/report.html"
        )
    # Not reached after an error, which is reported first: leaving the groups may wait for other ranks.
    engine.close()
    return STOPPED if stopped else 0
