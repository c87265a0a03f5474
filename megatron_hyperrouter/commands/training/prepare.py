"""From settings to a run: lock the folder, agree with the other ranks, open the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_hyperrouter import console
from megatron_hyperrouter.commands.training.execute import run
from megatron_hyperrouter.commands.training.opening import opening_of
from megatron_hyperrouter.commands.training.start_block import tokens_of_an_epoch
from megatron_hyperrouter.commands.training.together import (
    agree_on_data,
    agree_on_settings,
    decide_together,
    with_checkpoints_settings,
)
from megatron_hyperrouter.config.derived import separates_documents
from megatron_hyperrouter.config.run_folder import make_folders
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.data.order.index_files import IndexCache
from megatron_hyperrouter.data.stream.document_ends import warning_about_ends
from megatron_hyperrouter.data.tokenize.tokenizer import tokenizer_of
from megatron_hyperrouter.guard.launcher import Launcher
from megatron_hyperrouter.guard.meeting import Meeting
from megatron_hyperrouter.guard.run_lock import RunLock
from megatron_hyperrouter.train.samples import open_samples


def prepare_and_run(
    config: RunConfig, world_size: int, launcher: Launcher, remark: Callable[[], None]
) -> int:
    """Train as the settings say; returns the exit status.  While it runs, no other run may use its folder.

    ``remark`` prints notes and warnings about the settings.  It is called after all checks, so that an
    error is printed without them.
    """
    with RunLock(Path(config.logging.run_dir), held=console.speaks()):
        return _prepare_and_run(config, world_size, launcher, remark)


def _prepare_and_run(
    config: RunConfig, world_size: int, launcher: Launcher, remark: Callable[[], None]
) -> int:
    meeting = Meeting.of_this_process()
    agree_on_settings(config, meeting)
    start = decide_together(config, meeting)
    config = with_checkpoints_settings(config, start)
    tokenizer = tokenizer_of(config.data)
    eod = tokenizer.eod if separates_documents(config) else None
    samples = open_samples(
        config,
        vocab_size=tokenizer.vocab_size,
        eod=eod,
        tokenizer=tokenizer.identity(),
        cache=IndexCache(config.data.data_cache_path, fallback=f"{config.logging.run_dir}/index-cache"),
        world_size=world_size,
        ledger=start.ledger,
        step=start.step,
    )
    agree_on_data(meeting, tokenizer.identity(), samples.files())
    remark()
    if about_ends := warning_about_ends(samples.config.data, samples.builder.stores.values(), eod):
        console.warn(about_ends)
    if console.speaks():
        make_folders(samples.config)
    epoch = tokens_of_an_epoch(samples.builder, samples.mixes)
    opening = opening_of(config, world_size, meeting.hosts)
    return run(samples, tokenizer, start, launcher, eod=eod, epoch=epoch, opening=opening)
