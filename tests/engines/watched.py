"""What routers chose and what arrived at experts in one step, seen from outside the engine: hooks on the
modules of one rank.

A micro-batch's slots are those of DeepSpeed's dispatch, of the same size for every expert.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hyperrouter.engines import grouped


class Watched:
    """Sees each pass of a micro-batch through a router and its experts; :meth:`take` tells a step, the same
    on every rank.
    """

    def __init__(self, engine: Any) -> None:
        """``engine``: of either host, not with activation recompute, which would count twice."""
        self.engine = engine
        self._forget()
        grouped.experts = self._grouped(grouped.experts)
        for prefix, router in engine.routers.items():
            router.register_forward_hook(
                lambda _, inputs, routing, prefix=prefix: self._routed(prefix, routing)
            )
        for chunk in engine.modules():
            for module in chunk.modules():
                # of DeepSpeed: [ranks, local experts, slots, D], empty slots are zero
                if type(module).__name__ == "Experts":
                    module.register_forward_pre_hook(lambda _, inputs: self._dispatched(inputs[0]))
                elif (
                    type(module).__name__ == "SequentialMLP"
                ):  # of megatron-core: (routes, routes to each local expert, weights)
                    module.register_forward_pre_hook(lambda _, inputs: self._permuted(inputs[1]))

    def _forget(self) -> None:
        self.topk: set[int] = set()
        self.arrived = 0
        self.slots: list[int] = []  # of each pass
        self.largest: list[int] = []  # routes to one expert in each pass, from this rank
        self.load: dict[str, Tensor] = {}

    def _routed(self, prefix: str, routing: Any) -> None:
        load_E = torch.bincount(routing.experts_TK.flatten(), minlength=routing.logits_TE.size(1))
        self.load[prefix] = self.load.get(prefix, torch.zeros_like(load_E)) + load_E
        self.largest.append(int(load_E.max()))
        self.topk |= {routing.experts_TK.size(1)} | set(self._told())

    def _told(self) -> list[int]:
        """The k that megatron-core's dispatchers go by."""
        if not hasattr(self.engine, "core"):
            return []
        dispatchers = [
            module.token_dispatcher
            for chunk in self.engine.chunks
            for module in chunk.modules()
            if hasattr(module, "token_dispatcher")
        ]
        assert dispatchers
        return [
            self.engine.core.moe_router_topk,
            *(each.router_topk for each in dispatchers if hasattr(each, "router_topk")),
        ]

    def _dispatched(self, inputs: Tensor) -> None:
        self.arrived += int((inputs != 0).any(dim=-1).sum())
        self.slots.append(inputs.size(2))

    def _grouped(self, experts: Any) -> Any:
        """Experts in grouped products: ``ends_L[-1]`` rows of theirs."""

        def counted(x: Tensor, w1: Tensor, w2: Tensor, ends_L: Tensor, *more: Any) -> Any:
            self.arrived += int(ends_L[-1])
            return experts(x, w1, w2, ends_L, *more)

        return counted

    def _permuted(self, counts_E: Tensor) -> None:
        self.arrived += int(counts_E.sum())

    def take(self) -> dict[str, Any]:
        """All k that were seen; routes that arrived; the most loaded expert over the mean, by layer; slots,
        and what they had to hold.
        """
        mine = (self.topk, self.arrived, self.slots, self.largest, self.load)
        ranks: list[Any] = [None] * int(os.environ["WORLD_SIZE"])
        dist.all_gather_object(ranks, mine)
        self._forget()
        loads: dict[str, Tensor] = {}
        for _, _, _, _, load in ranks:
            for prefix, load_E in load.items():
                loads[prefix] = loads.get(prefix, torch.zeros_like(load_E)) + load_E
        return {
            "topk": sorted(set().union(*(topk for topk, *_ in ranks))),
            "arrived": sum(arrived for _, arrived, *_ in ranks),
            "load": [float(loads[prefix].max() / loads[prefix].double().mean()) for prefix in sorted(loads)],
            "slots": [slots for _, _, slots, _, _ in ranks],
            "largest": [largest for _, _, _, largest, _ in ranks],
        }


@contextlib.contextmanager
def counted(wanted: bool) -> Iterator[Counter[str]]:
    """Inside, how often modules of each class run, in the backward pass too."""
    calls: Counter[str] = Counter()
    if not wanted:
        yield calls
        return

    def count(module: torch.nn.Module, *_: Any) -> None:
        calls[type(module).__name__] += 1

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield calls
    finally:
        hook.remove()
