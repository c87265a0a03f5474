"""Exchanges rows of tensors between ranks, without a gradient."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hyperrouter.config.derived import hypernetwork_parts
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.model.parallel import data_group
from megatron_hyperrouter.routers.base import DataRanks


def rows_of_all(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks of ``group``, rank by rank (collective); every rank has the same number."""
    if group.size() == 1:
        return rows
    # gloo takes the ranks' rows one after the other, not stacked.
    gathered = rows.new_empty(group.size() * rows.size(0), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
    return gathered


def data_ranks(config: RunConfig) -> DataRanks | None:
    """The ranks that divide the router's frozen part; None if every rank has all of it."""
    if not dist.is_initialized() or hypernetwork_parts(config, dist.get_world_size()) == 1:
        return None
    return RankGroup(data_group())


class RankGroup:
    """A process group as ``routers.base.DataRanks``."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.size = group.rank(), group.size()

    def gather(self, part: Tensor) -> Tensor:
        """The tensors of all ranks, stacked rank by rank (collective)."""
        return rows_of_all(part.unsqueeze(0), self._group)

    def sum_of_own(self, parts: Tensor) -> Tensor:
        """``parts[r]`` is for rank r; returns the sum of what all ranks have for this one (collective). The
        parts are added here, rank by rank, so the order of the sum, and its last bit, do not depend on the
        library.
        """
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous(), group=self._group)
        return received.sum(0)
