"""Which part of a whole weight this rank holds: one rule for initial weights, checkpoints and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_hyperrouter.model.names import is_expert


@dataclass(frozen=True)
class Shard:
    """Piece ``rank`` of ``size`` along ``dim``; ``parts`` matrices are stacked along it and cut each by itself."""

    dim: int
    rank: int
    size: int
    parts: int = 1

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the whole weight, given that of the piece."""
        return tuple(length * self.size if axis == self.dim else length for axis, length in enumerate(shape))

    def cut(self, whole: Tensor) -> Tensor:
        """The piece."""
        return torch.cat([part.chunk(self.size, self.dim)[self.rank] for part in whole.chunk(self.parts, self.dim)], self.dim)

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole, from all pieces in order of rank."""
        split = [piece.chunk(self.parts, self.dim) for piece in pieces]
        return torch.cat([piece[part] for part in range(self.parts) for piece in split], self.dim)


def shard_of(name: str, parameter: nn.Parameter) -> Shard | None:
    """The piece that this rank holds of the parameter with this global name; None where it holds the whole.

    megatron-core marks its column- and row-parallel weights with ``tensor_model_parallel`` and ``partition_dim``.
    """
    size, rank = tensor_parallel_place(name)
    dim = getattr(parameter, "partition_dim", -1)
    if size == 1 or dim < 0 or not getattr(parameter, "tensor_model_parallel", False):
        return None
    return Shard(dim, rank, size, parts=2 if name.endswith("linear_fc1.weight") else 1)  # SwiGLU: [gate; up]


def tensor_parallel_place(name: str) -> tuple[int, int]:
    """(size, rank) of the tensor parallelism that cuts the parameter with this global name."""
    if is_expert(name):
        return parallel_state.get_expert_tensor_parallel_world_size(), parallel_state.get_expert_tensor_parallel_rank()
    return parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()


def gathered(name: str, piece: Tensor, shard: Shard) -> Tensor:
    """The whole weight, on every rank of the tensor-parallel group (collective)."""
    expert = is_expert(name)
    group = parallel_state.get_expert_tensor_parallel_group() if expert else parallel_state.get_tensor_model_parallel_group()
    pieces = [torch.empty_like(piece) for _ in range(shard.size)]
    dist.all_gather(pieces, piece.detach().contiguous(), group=group)
    return shard.join(pieces)
