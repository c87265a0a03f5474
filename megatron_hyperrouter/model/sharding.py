"""The part of each whole weight that a rank has: one rule for initial weights, checkpoints and
comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_hyperrouter.model.names import WORD_EMBEDDINGS, is_expert


@dataclass(frozen=True)
class Shard:
    """Part ``rank`` of ``size`` along ``dim``; ``parts`` matrices are stacked along it, and each is split
    separately.
    """

    dim: int
    rank: int
    size: int
    parts: int = 1

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the whole weight, given that of the piece."""
        return tuple(length * self.size if axis == self.dim else length for axis, length in enumerate(shape))

    def cut(self, whole: Tensor) -> Tensor:
        """The piece."""
        return torch.cat(
            [part.chunk(self.size, self.dim)[self.rank] for part in whole.chunk(self.parts, self.dim)],
            self.dim,
        )

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole, from all pieces in order of rank."""
        split = [piece.chunk(self.parts, self.dim) for piece in pieces]
        return torch.cat([piece[part] for part in range(self.parts) for piece in split], self.dim)


# Matrices that tensor parallelism cuts, by the end of their names: along which dimension. Everything else
# is whole on every rank. Not megatron-core's mark on the weight (``partition_dim``): Transformer Engine's
# is wrong on the second matrix of an expert.
_CUT = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_q_proj.weight": 0,
    "linear_q_up_proj.weight": 0,
    "linear_kv_up_proj.weight": 0,
    "eh_proj.weight": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc2.weight": 1,
}


def is_cut(name: str) -> bool:
    """Whether tensor parallelism splits the parameter with this global name; others are whole on each
    rank.
    """
    return name.endswith(tuple(_CUT))


def shard_of(name: str) -> Shard | None:
    """The piece that this rank has of the parameter with this global name; None if it has the
    whole.
    """
    size, rank = tensor_parallel_place(name)
    dim = next((dim for end, dim in _CUT.items() if name.endswith(end)), None)
    if size == 1 or dim is None:
        return None
    # SwiGLU: [gate; up]
    return Shard(dim, rank, size, parts=2 if name.endswith("linear_fc1.weight") else 1)


def tensor_parallel_place(name: str) -> tuple[int, int]:
    """(size, rank) of the tensor parallelism that splits the parameter with this global name."""
    if is_expert(name):
        return (
            parallel_state.get_expert_tensor_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_rank(),
        )
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


def replica_place(name: str) -> tuple[int, int]:
    """(number, rank) of the data-parallel ranks that have the same piece of the parameter with this global
    name; context-parallel ranks are among them.
    """
    if is_expert(name):
        return (
            parallel_state.get_expert_data_parallel_world_size(),
            parallel_state.get_expert_data_parallel_rank(),
        )
    return (
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def is_second_copy(name: str) -> bool:
    """True for the last pipeline stage's copy of the embedding: the first stage's is the one that is kept."""
    return name == WORD_EMBEDDINGS and parallel_state.get_pipeline_model_parallel_rank() != 0


def gathered(name: str, piece: Tensor, shard: Shard) -> Tensor:
    """The whole weight, on every rank of the tensor-parallel group (collective)."""
    expert = is_expert(name)
    group = (
        parallel_state.get_expert_tensor_parallel_group()
        if expert
        else parallel_state.get_tensor_model_parallel_group()
    )
    pieces = [torch.empty_like(piece) for _ in range(shard.size)]
    dist.all_gather(pieces, piece.detach().contiguous(), group=group)
    return shard.join(pieces)
