"""megatron-core's parallel groups, which define the layout of the ranks for both engines."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from megatron_hyperrouter.config.derived import expert_tensor_size
from megatron_hyperrouter.config.tree import RunConfig


def make_groups(config: RunConfig) -> None:
    """Cut the ranks of torch.distributed into tensor, pipeline, context, expert and data-parallel groups."""
    parallel = config.parallel
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks
        if chunks > 1
        else None,  # one chunk is the plain schedule, not an interleaved one
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_size(config),
        create_gloo_process_groups=False,
    )


def expert_group() -> dist.ProcessGroup | None:
    """The ranks that share all experts, those of one expert side by side; None if this rank has them all."""
    group: dist.ProcessGroup = parallel_state.get_expert_tensor_and_model_parallel_group()
    return None if group.size() == 1 else group


def data_group() -> dist.ProcessGroup:
    """The ranks that have the same dense parameters, whose gradients an engine sums over them."""
    group: dist.ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


def expert_rank() -> int:
    """This rank's place among those that share all experts of a layer."""
    return int(parallel_state.get_expert_model_parallel_rank())


def seed_dropout(config: RunConfig, *, seed: int | None = None) -> None:
    """Seed torch's generators, which only dropout uses: weights, data and routing have separate streams.

    ``seed``: instead of the run's seed.
    """
    seed = (
        config.train.seed if seed is None else seed
    ) + 100 * parallel_state.get_pipeline_model_parallel_rank()
    data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    if torch.cuda.is_available() or config.engine.engine == "megatron" or config.parallel.sequence_parallel:
        # megatron-core's tracker; on the CPU the compat room serves it
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed + 10_000 * data_rank)


def dropout_states() -> dict[str, Tensor]:
    """The states of megatron-core's tracker, which dropout in tensor-parallel regions uses; empty if
    nothing has seeded it.
    """
    states: dict[str, Tensor] = tensor_parallel.get_cuda_rng_tracker().get_states()
    return states


def set_dropout_states(states: dict[str, Tensor]) -> None:
    """Restore the states that :func:`dropout_states` returned."""
    tensor_parallel.get_cuda_rng_tracker().set_states(states)


def forget_groups() -> None:
    """The opposite of :func:`make_groups`, for megatron-core's own records."""
    parallel_state.destroy_model_parallel()
