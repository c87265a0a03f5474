"""Whether all ranks that have a weight have the same bits of it.

Data-parallel ranks have the same dense weights, expert-data-parallel ranks the same experts, and
tensor-parallel ranks the same norms and routers; the last pipeline stage may have a copy of the embedding.
All of them compute the same update, so a bit that differs is a fault of a machine or of this program.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hyperrouter.checkpoint.boxes import Box
from megatron_hyperrouter.checkpoint.digest import unread_digest
from megatron_hyperrouter.engines.base import Deviation
from megatron_hyperrouter.engines.saved.pieces import Holding, weights
from megatron_hyperrouter.model.sharding import shard_of

_ABSENT = torch.iinfo(torch.int64).min  # loses against every digest and against every complement


class Replicas:
    """Compares the weights of all ranks; their names are exchanged once."""

    def __init__(self) -> None:
        self._places: dict[str, int] | None = None  # of every piece of the model, in one order on all ranks

    def deviations(self, rank: int, holding: Holding) -> list[Deviation]:
        """The weights whose bits differ between ranks (collective); one reduction if there are none."""
        held: dict[str, Tensor] = {}
        for name, tensor in weights(holding):
            # The first of a name counts: with multi-token prediction, the last stage of megatron-core
            # 0.16.1 has an output matrix beside its embedding, and never uses it (gpt_model.py:249).
            held.setdefault(_key(name), tensor)
        own = {key: _whole(tensor) for key, tensor in held.items()}
        places = self._all_places(own)
        found = torch.full((2, len(places)), _ABSENT, dtype=torch.int64, device=holding.device)
        mine = torch.tensor([places[key] for key in own], dtype=torch.int64, device=holding.device)
        digests = torch.stack(list(own.values())) if own else found[0, :0]
        found[0, mine] = digests
        found[1, mine] = ~digests  # the complement reverses the order: its maximum belongs to the minimum
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        differ = (found[0] != ~found[1]).cpu().tolist()
        names = [key for key, place in places.items() if differ[place]]
        return _named(rank, names, own) if names else []

    def _all_places(self, own: Mapping[str, Tensor]) -> dict[str, int]:
        if self._places is None:
            of_ranks: list[list[str]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(of_ranks, list(own))
            union = sorted({key for keys in of_ranks for key in keys})
            self._places = {key: place for place, key in enumerate(union)}
        return self._places


def _named(rank: int, keys: list[str], own: Mapping[str, Tensor]) -> list[Deviation]:
    """Which ranks deviate in these pieces (collective)."""
    told = (rank, socket.gethostname(), {key: int(own[key]) for key in keys if key in own})
    of_ranks = [told] * dist.get_world_size()
    dist.all_gather_object(of_ranks, told)
    found = []
    for key in keys:
        holders = [(rank, host, digests[key]) for rank, host, digests in of_ranks if key in digests]
        (usual, votes), *_ = Counter(digest for _, _, digest in holders).most_common()
        strays = tuple((rank, host) for rank, host, digest in holders if digest != usual)
        agree = tuple((rank, host) for rank, host, digest in holders if digest == usual)
        found.append(Deviation(key.partition("#")[0], strays, agree, sure=2 * votes > len(holders)))
    return found


def _key(name: str) -> str:
    """The same for all ranks that have the same numbers."""
    shard = shard_of(name)
    return name if shard is None else f"{name}#{shard.rank}"


def _whole(tensor: Tensor) -> Tensor:
    shape = tuple(tensor.shape)
    return unread_digest(tensor, Box((0,) * len(shape), shape), shape)
