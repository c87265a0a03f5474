"""Process groups: joining the launcher's ranks, and cutting them into parallel groups."""

from __future__ import annotations

import logging
import os
import socket

import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_hyperrouter.compat.deepspeed import skip_shm_build
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.base import Place


def join(config: RunConfig) -> Place:
    """Initialise torch.distributed, DeepSpeed's view of it and megatron-core's parallel groups."""
    _alone_without_launcher()
    skip_shm_build()
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed("nccl" if on_gpu else "gloo", verbose=False)
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size,
        create_gloo_process_groups=False,
    )
    place = Place(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )
    _seed(config, place)
    return place


def leave(*, keep_world: bool) -> None:
    """Forget the parallel groups, and end torch.distributed unless it is somebody else's."""
    from deepspeed.utils import groups

    parallel_state.destroy_model_parallel()
    groups._release_process_group_references(None)
    if not keep_world and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _alone_without_launcher() -> None:
    """Plain ``python program.py`` is one rank of one."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _seed(config: RunConfig, place: Place) -> None:
    """Dropout alone draws from these generators: weights, data and routing have streams of their own."""
    seed = config.train.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed + 10_000 * place.data_rank)
    if torch.cuda.is_available():
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
