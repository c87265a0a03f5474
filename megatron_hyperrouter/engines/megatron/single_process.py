"""One process with megatron-core's parallel groups, for tools that build a model and do not train it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from megatron_hyperrouter.compat.megatron import install
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.world import backend
from megatron_hyperrouter.model.parallel import forget_groups, make_groups, seed_dropout


@contextlib.contextmanager
def one_process(run: RunConfig) -> Iterator[None]:
    """The parallel groups of one process, on the CPU or on one GPU."""
    install()
    dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1)
    make_groups(run)
    seed_dropout(run)
    try:
        yield
    finally:
        forget_groups()
        dist.destroy_process_group()
