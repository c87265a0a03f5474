"""Describes a run without starting it."""

from __future__ import annotations

from megatron_hyperrouter import console
from megatron_hyperrouter.commands.training.start_block import start_block, tokens_of_an_epoch
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.data.order.index_files import IndexCache
from megatron_hyperrouter.data.stream.dataset import Builder
from megatron_hyperrouter.data.stream.mix_schedule import mixes_of, settled
from megatron_hyperrouter.data.tokenize.tokenizer import tokenizer_of
from megatron_hyperrouter.errors import DataError, HostError
from megatron_hyperrouter.planning.one_layout import holdings


def show_run(config: RunConfig, world_size: int) -> None:
    """Print the description of the run; a tokenizer or data that is not on this machine is reported."""
    vocab_size = epoch = None
    try:
        vocab_size = tokenizer_of(config.data).vocab_size
        epoch = _epoch(config, vocab_size)
    except (DataError, HostError) as error:
        known = vocab_size or config.data.vocab_size
        what = "the number of epochs" if known else "the number of epochs and the size of the embedding"
        console.note(f"the dry run cannot show {what}: {error.message}")
    model, held = holdings(config, vocab_size or config.data.vocab_size or 0, world_size)
    block = start_block(config, model.size, world_size=world_size, epoch=epoch)
    lines = [(label, text) for label, text in block if label not in ("device", "run folder")]
    console.table([*lines, *held])
    console.note("the memory is an estimate, which excludes CUDA and NCCL; to compare layouts, use mhr plan")
    console.note("dry run: the settings are valid; nothing was started")


def _epoch(config: RunConfig, vocab_size: int) -> int:
    mixes = mixes_of(config.data)
    builder = Builder(
        settled(config.data, mixes),
        seq_length=config.model.seq_length,
        seed=config.train.seed,
        vocab_size=vocab_size,
        cache=IndexCache(None, fallback=config.logging.run_dir),
    )
    return tokens_of_an_epoch(builder, mixes)
