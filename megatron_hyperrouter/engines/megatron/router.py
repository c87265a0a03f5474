"""A router in the router slot of megatron-core's ``MoELayer``.

Legend: ``S`` sequence and ``B`` batch on this rank, ``T = S * B`` tokens, ``D`` hidden size, ``E`` experts of the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_hyperrouter.engines.routing import Clock, RouterStatistics, heaviest, total_loss
from megatron_hyperrouter.routers.base import Router


class MegatronRouter(MegatronModule):
    """Serves megatron-core's ``RouterInterface``: ``forward`` and ``set_layer_number`` (moe_layer.py:36)."""

    router: Router

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None,
        *,
        make: Callable[[int], Router],
        clock: Clock | None = None,
        statistics: RouterStatistics | None = None,
    ) -> None:
        """``make``: the router of the layer of this number, counted from 1 over the whole model."""
        super().__init__(config=config)
        self.make, self.clock, self.statistics = make, clock or Clock(), statistics
        # Under sequence and context parallelism the ranks of this group share one micro-batch.
        self.group = None if pg_collection is None else pg_collection.tp_cp

    def set_layer_number(self, layer_number: int) -> None:
        """Called by the transformer layer; builds the router of this layer (numbers count from 1 over the whole model)."""
        self.router = self.make(layer_number)
        self.router.over_shards = self.over_shards
        for parameter in self.router.parameters():
            # Each TP rank sees its part of the tokens: finalize_model_grads sums what they found, as for the stock router.
            parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]

    def over_shards(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the ranks that share this micro-batch."""
        if self.group is None or self.group.size() == 1:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def forward(self, hidden_SBD: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns (weights, dense and zero off the chosen experts, ``_TE``; chosen, boolean ``_TE``)."""
        if padding_mask is not None:
            raise NotImplementedError("padding masks are not provided: samples are full")
        x_TD = hidden_SBD.flatten(0, -2)
        routing = self.router(x_TD, step=self.clock.step, topk=self.clock.topk)
        if self.statistics is not None:
            self.statistics.record(self.router.layer_number, routing, self.over_shards)
        zeros_TE = torch.zeros_like(routing.logits_TE)
        weights_TE = zeros_TE.scatter(1, routing.experts_TK, routing.weights_TK)
        chosen_TE = zeros_TE.bool().scatter(1, routing.experts_TK, True)
        if self.config.moe_expert_capacity_factor is not None:
            chosen_TE = self._kept(weights_TE.detach(), chosen_TE, routing.experts_TK.numel())
            weights_TE = weights_TE * chosen_TE
        if self.training and routing.losses:
            loss = total_loss(routing, x_TD.device)
            # A host that divides the gradients by the number of tokens divides this loss, a mean already, as well (router.py:417).
            loss = loss * x_TD.size(0) if self.config.calculate_per_token_loss else loss
            weights_TE = MoEAuxLossAutoScaler.apply(weights_TE, loss)
        return weights_TE, chosen_TE

    def _kept(self, weights_TE: Tensor, chosen_TE: Tensor, routes: int) -> Tensor:
        """What the capacity of each expert leaves of this rank's routes: in this host it is the router that drops (router.py:587)."""
        capacity = math.ceil(routes / self.router.num_experts * self.config.moe_expert_capacity_factor)
        by_weight = self.config.moe_token_drop_policy == "probs"
        kept_TE = heaviest(weights_TE if by_weight else chosen_TE.float(), capacity)
        return kept_TE if self.config.moe_pad_expert_input_to_capacity else kept_TE & chosen_TE
