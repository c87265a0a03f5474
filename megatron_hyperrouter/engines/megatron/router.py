"""A router in the router slot of megatron-core's ``MoELayer``.

Legend: ``S`` sequence and ``B`` batch on this rank, ``T = S * B`` tokens, ``D`` hidden size, ``E`` experts of the whole model.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.routing import Clock, RouterStatistics, make_router, total_loss
from megatron_hyperrouter.routers.base import Router


class MegatronRouter(MegatronModule):
    """Serves megatron-core's ``RouterInterface``: ``forward`` and ``set_layer_number`` (moe_layer.py:36)."""

    router: Router

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None,
        *,
        run: RunConfig,
        clock: Clock,
        statistics: RouterStatistics,
    ) -> None:
        super().__init__(config=config)
        self.run, self.clock, self.statistics = run, clock, statistics
        # Under sequence and context parallelism the ranks of this group share one micro-batch.
        self.group = None if pg_collection is None else pg_collection.tp_cp

    def set_layer_number(self, layer_number: int) -> None:
        """Called by the transformer layer; builds the router of this layer (numbers count from 1 over the whole model)."""
        self.router = make_router(self.run, layer_number)
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
        self.statistics.record(self.router.layer_number, routing, self.over_shards)
        zeros_TE = torch.zeros_like(routing.logits_TE)
        weights_TE = zeros_TE.scatter(1, routing.experts_TK, routing.weights_TK)
        chosen_TE = zeros_TE.bool().scatter(1, routing.experts_TK, True)
        if self.training and routing.losses:
            weights_TE = MoEAuxLossAutoScaler.apply(weights_TE, total_loss(routing, x_TD.device))
        return weights_TE, chosen_TE
