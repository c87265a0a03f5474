"""Process groups: joins the launcher's ranks through DeepSpeed, and forms the parallel groups."""

from __future__ import annotations

import logging

import torch
from megatron.core import parallel_state

from megatron_hyperrouter.compat.deepspeed import shape_gathered_tokens, skip_shm_build
from megatron_hyperrouter.compat.megatron import install as serve_megatron
from megatron_hyperrouter.compat.megatron import turn_in_few_operators
from megatron_hyperrouter.config.derived import recomputed_parts
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.base import RankPlace
from megatron_hyperrouter.engines.world import backend, join_world, single_rank_without_launcher
from megatron_hyperrouter.model.parallel import forget_groups, make_groups, seed_dropout


def join(config: RunConfig) -> RankPlace:
    """Initialise torch.distributed, DeepSpeed's view of it and megatron-core's parallel groups."""
    single_rank_without_launcher()
    skip_shm_build()
    shape_gathered_tokens()
    turn_in_few_operators()
    # megatron-core's scatter and gather ask for the CUDA device, its recomputation for the CUDA generator
    if config.parallel.tensor_model_parallel_size > 1 or "mlp" in recomputed_parts(config):
        serve_megatron()
    import deepspeed
    from deepspeed.constants import default_pg_timeout
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    host_backend = backend()
    if not torch.distributed.is_initialized():
        join_world(host_backend, timeout=default_pg_timeout)
        deepspeed.init_distributed(host_backend, verbose=False)
    make_groups(config)
    seed_dropout(config)
    return RankPlace(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def leave(*, keep_world: bool) -> None:
    """Forget the parallel groups, and end torch.distributed unless the caller had started it."""
    from deepspeed.utils import groups

    forget_groups()
    groups._release_process_group_references(None)
    if not keep_world and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
