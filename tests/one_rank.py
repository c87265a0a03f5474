"""A world of one process, for tests in the process of pytest itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist


@contextlib.contextmanager
def world(folder: Path) -> Iterator[None]:
    """torch.distributed and megatron-core's groups with one rank; nothing of them stays."""
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.model.parallel import forget_groups, make_groups

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    make_groups(RunConfig())
    try:
        yield
    finally:
        forget_groups()
        dist.destroy_process_group()
