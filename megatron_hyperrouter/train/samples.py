"""The samples of a run, opened before its engine: from its settings and from the record of what it has
read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_hyperrouter.config.derived import batch_sizes
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.data.order.index_files import IndexCache
from megatron_hyperrouter.data.stream import segments
from megatron_hyperrouter.data.stream.dataset import Builder, Splits
from megatron_hyperrouter.data.stream.file_identity import identity
from megatron_hyperrouter.data.stream.mix_schedule import mixes_of, settled


@dataclass(frozen=True)
class Samples:
    """``config``: the settings, with what the data files settled; ``builder``: what opened the files."""

    config: RunConfig
    splits: Splits
    builder: Builder
    mixes: Sequence[tuple[int, tuple[str, ...]]]  # completed steps from which on -> words of --data-path

    def files(self) -> dict[str, Mapping[str, Any]]:
        """Prefix -> identity of every file that the run reads."""
        return {prefix: identity(store) for prefix, store in self.builder.stores.items()}


def open_samples(
    config: RunConfig,
    *,
    vocab_size: int,
    eod: int | None,
    cache: IndexCache,
    world_size: int,
    ledger: list[dict[str, Any]],
    step: int,
    tokenizer: Mapping[str, Any] | None = None,
) -> Samples:
    """Open the data of a run that has done ``step`` steps; ``ledger`` says what these steps have read.

    ``tokenizer``: its identity, which must match that of the data; None: any.
    """
    needed = samples_needed(config, world_size)
    mixes = mixes_of(config.data, step=step)
    # the run's config.yaml then needs no other file
    config = replace(config, data=settled(config.data, mixes))
    builder = Builder(
        config.data,
        seq_length=config.model.seq_length,
        seed=config.train.seed,
        vocab_size=vocab_size,
        cache=cache,
        eod=eod,
        tokenizer=tokenizer,
    )
    splits = segments.splits_of_run(
        builder,
        mixes,
        ledger,
        step=step,
        train_iters=config.train.train_iters,
        sizes=batch_sizes(config, world_size),
        valid_samples=needed["valid_samples"],
        test_samples=needed["test_samples"],
    )
    return Samples(config, splits, builder, mixes)


def samples_needed(config: RunConfig, world_size: int) -> dict[str, int]:
    """How many samples a run needs: ``train_samples``, ``valid_samples``, ``test_samples``.

    Every evaluation scores the same ``--eval-iters`` global batches, so that its losses can be compared.
    """
    sizes = batch_sizes(config, world_size)
    scored = config.train.eval_iters * sizes.full if config.train.eval_interval else 0
    return {
        "train_samples": sizes.samples(config.train.train_iters),
        "valid_samples": scored,
        "test_samples": scored,
    }
