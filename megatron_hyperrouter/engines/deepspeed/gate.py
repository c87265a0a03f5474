"""A router in the place of DeepSpeed's ``TopKGate``.

Legend: ``T`` tokens on this rank, ``E`` experts of the whole model, ``K`` active experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_hyperrouter.engines.routing import Clock, RouterStatistics, total_loss
from megatron_hyperrouter.ops.balance import load
from megatron_hyperrouter.routers.base import Router


class SparseRoutes(NamedTuple):
    """What ``MOELayer.forward`` unpacks (deepspeed 0.19.8, moe/sharded_moe.py:651)."""

    loss: Tensor  # scalar, already weighted
    capacity: int  # slots of each expert
    num_experts: int
    experts_KT: Tensor  # expert of each route; -1 where it was dropped
    slots_KT: Tensor  # place among the expert's slots
    weights_KT: Tensor  # float32
    load_E: Tensor  # routes to each expert before dropping


class RouterGate(nn.Module):
    """Hands a router's choice to DeepSpeed's dispatch, for any k from 1 to E, dropless or with a capacity.

    DeepSpeed's own gate differs by k: at k = 1 weights are not renormalised, at k = 2 the balance loss counts first choices only.
    """

    def __init__(
        self,
        router: Router,
        *,
        clock: Clock | None = None,
        statistics: RouterStatistics | None = None,
        capacity_factor: float | None = None,
        capacity_multiple: int = 1,
    ) -> None:
        """``capacity_factor``: None drops nothing; ``capacity_multiple``: MOELayer cuts the slots over this many TP ranks."""
        super().__init__()
        self.router = router
        self.clock = clock or Clock()
        self.statistics = statistics
        self.capacity_factor = capacity_factor
        self.capacity_multiple = capacity_multiple
        self.ep_group: dist.ProcessGroup | None = None

    def _set_ep_group(self, ep_group: dist.ProcessGroup | None) -> None:
        self.ep_group = ep_group

    def forward(self, x_TD: Tensor, used_token: Tensor | None = None, sparse_routes: bool = True, use_tutel: bool = False) -> SparseRoutes:
        """Route the tokens of this rank; the optional arguments are DeepSpeed's and have to keep these values."""
        if used_token is not None or not sparse_routes or use_tutel:
            raise NotImplementedError("RouterGate serves sparse routes of all tokens only")
        routing = self.router(x_TD, step=self.clock.step, topk=self.clock.topk)
        if self.statistics is not None:
            self.statistics.record(self.router.layer_number, routing)
        load_E = load(routing.experts_TK, self.router.num_experts)
        chosen_TE = torch.zeros_like(routing.logits_TE, dtype=torch.bool).scatter_(1, routing.experts_TK, True)
        capacity = self._capacity(routing.experts_TK, load_E)
        if self.capacity_factor is not None:
            chosen_TE = chosen_TE & _heaviest(routing.weights_TK, routing.experts_TK, chosen_TE, capacity)
        kept_TK = chosen_TE.gather(1, routing.experts_TK)
        slots_TK = (chosen_TE.cumsum(0, dtype=torch.int32) - 1).gather(1, routing.experts_TK)
        loss = total_loss(routing, x_TD.device)
        return SparseRoutes(
            loss=loss,
            capacity=capacity,
            num_experts=self.router.num_experts,
            experts_KT=torch.where(kept_TK, routing.experts_TK, -1).to(torch.int32).t().contiguous(),
            slots_KT=(slots_TK * kept_TK).to(torch.int32).t().contiguous(),
            weights_KT=(routing.weights_TK * kept_TK).t().contiguous(),
            load_E=load_E,
        )

    def _capacity(self, experts_TK: Tensor, load_E: Tensor) -> int:
        """Slots an expert: the largest load in the expert-parallel group, or the capacity that was set."""
        if self.capacity_factor is not None:
            tokens, topk = experts_TK.shape
            slots = math.ceil(tokens * topk / self.router.num_experts * self.capacity_factor)
        else:
            largest = load_E.max()
            if self.ep_group is not None and dist.get_world_size(self.ep_group) > 1:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.ep_group)
            slots = int(largest)
        return -(-slots // self.capacity_multiple) * self.capacity_multiple


def _heaviest(weights_TK: Tensor, experts_TK: Tensor, chosen_TE: Tensor, capacity: int) -> Tensor:
    """True for the ``capacity`` routes of each expert that have the largest weights (Megatron's "probs" policy).

    Equal weights, which k = 1 gives to all, go to the earlier tokens; ``torch.topk`` would leave the choice to the device.
    """
    weights_TE = torch.zeros(chosen_TE.shape, dtype=weights_TK.dtype, device=weights_TK.device).scatter_(1, experts_TK, weights_TK.detach())
    heaviest_CE = weights_TE.sort(dim=0, descending=True, stable=True).indices[:capacity]
    return torch.zeros_like(chosen_TE).scatter_(0, heaviest_CE, True)
