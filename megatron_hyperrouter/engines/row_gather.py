"""Gathers rows of several ranks into one tensor, without a gradient."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def rows_of_all(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks of ``group``, rank by rank (collective); every rank has the same number."""
    if group.size() == 1:
        return rows
    # gloo takes the ranks' rows one after the other, not stacked.
    gathered = rows.new_empty(group.size() * rows.size(0), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
    return gathered
