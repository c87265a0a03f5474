"""DeepSpeed's ``MOELayer`` for routers that consult the experts, and for experts in grouped products.

Legend: ``T`` tokens on this rank, ``D`` hidden size, ``E`` experts of the whole model, ``K`` active
experts, ``G`` expert-parallel ranks, ``L`` experts on each of them, ``R = G * T``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.moe.sharded_moe import MOELayer
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.clock import single_routes, weighted_sum
from megatron_hyperrouter.engines.deepspeed.mlp_slot.gate import RouterGate
from megatron_hyperrouter.engines.grouped import GroupedExperts, sharing_of
from megatron_hyperrouter.engines.routing import total_loss
from megatron_hyperrouter.engines.row_gather import rows_of_all


def stack_experts(layer: MOELayer, run: RunConfig) -> None:
    """Give ``layer`` the experts of a run as one module; before :func:`consult_experts`."""
    layer.experts = GroupedExperts(run, sharing_of(run))


def consult_experts(layer: MOELayer) -> None:
    """Give ``layer`` the forward pass that its router needs, if the router needs more than its own
    logits.
    """
    # Its parameters stay where the optimizer found them.
    if isinstance(layer.experts, GroupedExperts):
        layer.__class__ = GroupedMOELayer
    elif layer.gate.router.needs_experts:
        layer.__class__ = RoutedMOELayer


class RoutedMOELayer(MOELayer):
    """Implements ``ExpertBank``, and gives the router the outputs of the experts that it chose."""

    gate: RouterGate
    l_aux: Tensor
    _autocast: bool = False  # of the current pass

    def forward(self, *given: Tensor, **kwargs: Any) -> Tensor:
        """Like ``MOELayer.forward`` (sharded_moe.py:632), but dispatches once, as the router decides."""
        hidden, site = given[0], self.gate.site
        self._autocast = torch.is_autocast_enabled(hidden.device.type)
        x_TD = hidden.reshape(-1, hidden.size(-1))
        routing, now = site.route(x_TD, experts=self)
        if not site.router.wants_outputs(now):
            with site.given(routing):
                output: Tensor = super().forward(*given, **kwargs)
            return output
        if given[1] is not None:
            raise NotImplementedError("RouterGate does not support used_token")
        routes_RD = x_TD.repeat_interleave(routing.experts_TK.size(1), 0)
        with site.given(single_routes(routing)), self._dropping_nothing():
            outputs_RD = super().forward(routes_RD, None)
        outputs_TKD = outputs_RD.view(*routing.experts_TK.shape, -1)
        routing = site.router.combine(routing, x_TD, outputs_TKD, now)
        self.l_aux = total_loss(routing, x_TD.device)
        return weighted_sum(routing.weights_TK, outputs_TKD).view(hidden.shape)

    @torch.no_grad()
    def scores_TE(self, x_TD: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
        """See :class:`megatron_hyperrouter.routers.base.ExpertBank`: tokens go to the experts, scores
        alone come back.
        """
        ranks = self.ep_size
        all_RD = x_TD if ranks == 1 else rows_of_all(x_TD, self.ep_group)
        columns = []
        for expert in self.each_expert():
            parts = []
            for rows_TD in all_RD.split(x_TD.size(0)):  # hidden units of one rank's tokens at a time
                # as the experts get their tokens: [groups, 1, slots, D]
                given = rows_TD.view(1, 1, *rows_TD.shape)
                # the router's maths around it is without
                with torch.autocast(x_TD.device.type, enabled=self._autocast):
                    output = _output(expert, given)
                parts.append(score(output.float()).flatten())
            columns.append(torch.stack(parts))
        local_GTL = torch.stack(columns, -1)
        if ranks == 1:
            return local_GTL[0]
        mine_GTL = torch.empty_like(local_GTL)
        dist.all_to_all_single(mine_GTL, local_GTL, group=self.ep_group)
        return mine_GTL.transpose(0, 1).flatten(1)

    def each_expert(self) -> list[Callable[[Tensor], Any]]:
        """The experts of this rank."""
        return list(self.experts.deepspeed_experts)

    @contextmanager
    def _dropping_nothing(self) -> Iterator[None]:
        self.gate.dropless = True
        try:
            yield
        finally:
            self.gate.dropless = False


class GroupedMOELayer(RoutedMOELayer):
    """The experts of a rank in grouped products, and an exchange of tokens without padding.

    Every tensor-parallel rank routes all tokens; each sends its part of them to the experts.
    """

    def forward(self, *given: Tensor, **kwargs: Any) -> Tensor:
        """As :meth:`RoutedMOELayer.forward`."""
        hidden, site = given[0], self.gate.site
        x_TD = hidden.reshape(-1, hidden.size(-1))
        routing, now = site.route(x_TD, experts=self)
        tokens = TensorRanksTokens(x_TD.size(0))
        x_TD, experts_TK = tokens.own(x_TD), tokens.own(routing.experts_TK)
        if site.router.wants_outputs(now):
            outputs_TKD = tokens.all(self.experts.outputs_TKD(x_TD, experts_TK))
            routing = site.router.combine(routing, hidden.reshape(-1, hidden.size(-1)), outputs_TKD, now)
            output_TD = weighted_sum(routing.weights_TK, outputs_TKD)
        else:
            kept_TK = self.gate.kept_TK(routing)
            own_kept_TK = None if kept_TK is None else tokens.own(kept_TK)
            weights_TK = tokens.own(routing.weights_TK)
            output_TD = tokens.all(self.experts.weighted(x_TD, weights_TK, experts_TK, own_kept_TK))
        self.l_aux = total_loss(routing, hidden.device)
        self.exp_counts = None  # not used
        return output_TD.view(hidden.shape)

    def each_expert(self) -> list[Callable[[Tensor], Any]]:
        """Each expert as a whole, even if several ranks share it."""
        shared = self.experts.sharing.parts > 1
        return [partial(_whole, expert) if shared else expert for expert in self.experts.local_experts]


class TensorRanksTokens:
    """Tokens that all TP ranks have: each rank takes its part of them, and gets all parts back."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.ranks = parallel_state.get_tensor_model_parallel_world_size()

    def own(self, rows: Tensor) -> Tensor:
        """This rank's rows; what is missing for equal parts is filled with 0."""
        if self.ranks == 1:
            return rows
        filled = F.pad(rows, [0, 0] * (rows.dim() - 1) + [0, -self.count % self.ranks])
        if not rows.is_floating_point():
            return filled.chunk(self.ranks)[parallel_state.get_tensor_model_parallel_rank()]
        part: Tensor = scatter_to_sequence_parallel_region(filled)
        return part

    def all(self, rows: Tensor) -> Tensor:
        """The rows of all ranks; each rank takes its own part of the gradient, because every rank has the
        whole gradient.
        """
        if self.ranks == 1:
            return rows
        whole: Tensor = gather_from_sequence_parallel_region(rows, tensor_parallel_output_grad=False)
        return whole[: self.count]


def _whole(expert: Callable[[Tensor], tuple[Tensor, None]], rows: Tensor) -> Tensor:
    output, _ = expert(rows)
    dist.all_reduce(output, group=parallel_state.get_tensor_model_parallel_group())
    return output


def _output(expert: Any, rows: Tensor) -> Tensor:
    """An expert of your own may also return its bias."""
    made = expert(rows)
    output: Tensor = made[0] if isinstance(made, tuple) else made
    return output
