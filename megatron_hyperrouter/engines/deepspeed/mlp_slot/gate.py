"""A router that replaces DeepSpeed's ``TopKGate``.

Legend: ``T`` tokens on this rank, ``E`` experts of the whole model, ``K`` active experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_hyperrouter.engines.clock import Clock, RouterSite
from megatron_hyperrouter.engines.routing import kept_routes, total_loss
from megatron_hyperrouter.engines.statistics import RouterStatistics
from megatron_hyperrouter.ops.balance import load
from megatron_hyperrouter.routers.base import Router, Routing


class SparseRoutes(NamedTuple):
    """What ``MOELayer.forward`` unpacks (deepspeed 0.19.8, moe/sharded_moe.py:651)."""

    loss: Tensor  # scalar, already weighted
    capacity: int  # slots of each expert
    num_experts: int
    experts_KT: Tensor  # expert of each route; -1 if it was dropped
    slots_KT: Tensor  # place among the expert's slots
    weights_KT: Tensor  # float32
    load_E: Tensor  # routes to each expert before dropping


class RouterGate(nn.Module):
    """Passes a router's choice to DeepSpeed's dispatch, for any k from 1 to E, without dropping or with a
    capacity.

    DeepSpeed's own gate differs by k: at k = 1 weights are not renormalised, and at k = 2 the balance loss
    counts only first choices.
    """

    def __init__(
        self,
        router: Router,
        *,
        clock: Clock | None = None,
        statistics: RouterStatistics | None = None,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        min_capacity: int = 0,
        capacity_multiple: int | Callable[[], int] = 1,
    ) -> None:
        """``capacity_factor``: number of slots as a multiple of an even load; None drops nothing.
        ``eval_capacity_factor``: outside training; by default the same.  ``min_capacity``: smallest number
        of slots.  ``capacity_multiple``: number of TP ranks over which MOELayer splits the slots.
        """
        super().__init__()
        self.router = router
        self.site = RouterSite(router, clock=clock, statistics=statistics)
        self.dropless = (
            False  # whatever the capacity: as long as a router waits for the outputs of all its choices
        )
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = capacity_factor if eval_capacity_factor is None else eval_capacity_factor
        self.min_capacity = min_capacity
        self.capacity_multiple = capacity_multiple
        self.ep_group: dist.ProcessGroup | None = None

    @property
    def clock(self) -> Clock:
        """The step, and k while evaluating."""
        return self.site.clock

    def _set_ep_group(self, ep_group: dist.ProcessGroup | None) -> None:
        self.ep_group = ep_group

    def forward(
        self,
        x_TD: Tensor,
        used_token: Tensor | None = None,
        sparse_routes: bool = True,
        use_tutel: bool = False,
    ) -> SparseRoutes:
        """Route the tokens of this rank; the optional arguments are DeepSpeed's and must have these
        values.
        """
        if used_token is not None or not sparse_routes or use_tutel:
            raise NotImplementedError(
                "RouterGate routes all tokens and returns sparse routes; leave used_token, "
                "sparse_routes and use_tutel at their defaults"
            )
        routing = self.site.routing(x_TD)
        load_E = load(routing.experts_TK, self.router.num_experts)
        kept_TK = self.kept_TK(routing)
        slots = self._largest(load_E) if kept_TK is None else self._capacity(routing.experts_TK)
        multiple = self.capacity_multiple() if callable(self.capacity_multiple) else self.capacity_multiple
        if kept_TK is None:
            kept_TK = torch.ones_like(routing.experts_TK, dtype=torch.bool)
        nothing_TE = torch.zeros_like(routing.logits_TE, dtype=torch.bool)
        chosen_TE = nothing_TE.scatter(1, routing.experts_TK, kept_TK)
        slots_TK = (chosen_TE.cumsum(0, dtype=torch.int32) - 1).gather(1, routing.experts_TK)
        loss = total_loss(routing, x_TD.device)
        return SparseRoutes(
            loss=loss,
            capacity=-(-slots // multiple) * multiple,
            num_experts=self.router.num_experts,
            experts_KT=torch.where(kept_TK, routing.experts_TK, -1).to(torch.int32).t().contiguous(),
            slots_KT=(slots_TK * kept_TK).to(torch.int32).t().contiguous(),
            weights_KT=(routing.weights_TK * kept_TK).t().contiguous(),
            load_E=load_E,
        )

    def kept_TK(self, routing: Routing) -> Tensor | None:
        """The routes that the capacity leaves; None if nothing is dropped."""
        if self._factor is None:
            return None
        return kept_routes(routing, self._capacity(routing.experts_TK))

    @property
    def _factor(self) -> float | None:
        if self.dropless or self.clock.dropless:
            return None
        return self.capacity_factor if self.training else self.eval_capacity_factor

    def _capacity(self, experts_TK: Tensor) -> int:
        """Without the padding for TP ranks, which would drop fewer tokens."""
        even = experts_TK.numel() / self.router.num_experts
        return max(math.ceil(even * (self._factor or 0.0)), self.min_capacity)

    def _largest(self, load_E: Tensor) -> int:
        """The largest load in the expert-parallel group."""
        largest = load_E.max()
        if self.ep_group is not None and dist.get_world_size(self.ep_group) > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.ep_group)
        return int(largest)
