"""A router in the router slot of megatron-core's ``MoELayer``.

Legend: ``S`` sequence and ``B`` batch on this rank, ``T = S * B`` tokens, ``D`` hidden size, ``E`` experts of
the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_hyperrouter.engines.clock import Clock, RouterSite
from megatron_hyperrouter.engines.routing import heaviest, kept_routes, total_loss
from megatron_hyperrouter.engines.statistics import RouterStatistics
from megatron_hyperrouter.errors import HostError
from megatron_hyperrouter.routers.base import Router, Routing


class MegatronRouter(MegatronModule):
    """Implements megatron-core's ``RouterInterface``: ``forward`` and ``set_layer_number``
    (moe_layer.py:42).
    """

    router: Router
    site: RouterSite

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None,
        *,
        make: Callable[[int], Router],
        clock: Clock | None = None,
        statistics: RouterStatistics | None = None,
        is_mtp_layer: bool = False,
        **_: object,
    ) -> None:
        """``make``: the router of the layer of this number, counted from 1 over the whole model.

        megatron-core 0.19 gives ``is_mtp_layer`` and counts the layers of multi-token prediction from 1;
        before, they followed the others.
        """
        super().__init__(config=config)
        self._before = config.num_layers if is_mtp_layer else 0
        self.make, self._clock, self._statistics = make, clock or Clock(), statistics
        self.dropless = (
            False  # whatever the capacity: as long as a router waits for the outputs of all its choices
        )
        # Under sequence and context parallelism the ranks of this group share one micro-batch.
        self.group = None if pg_collection is None else pg_collection.tp_cp

    def set_layer_number(self, layer_number: int) -> None:
        """Called by the transformer layer; builds the router of this layer."""
        self.router = self.make(self._before + layer_number)
        self.site = RouterSite(self.router, clock=self._clock, statistics=self._statistics)
        if self.group is not None and self.group.size() > 1:
            self.router.over_shards, self.router.gather_shards = self.over_shards, self.gather_shards
        for parameter in self.router.parameters():
            # Each TP rank sees its part of the tokens: finalize_model_grads sums what they found, as for the
            # stock router.
            parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]

    @property
    def clock(self) -> Clock:
        """The step, and k while evaluating."""
        return self.site.clock

    def over_shards(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the ranks that share this micro-batch."""
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def gather_shards(self, rows: Tensor) -> Tensor:
        """The rows of all these ranks; the gradient of this rank's rows comes back."""
        gathered: Tensor = gather_from_sequence_parallel_region(
            rows.contiguous(), tensor_parallel_output_grad=False, group=self.group
        )
        return gathered

    def forward(self, hidden_SBD: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns (weights, dense and zero off the chosen experts, ``_TE``; chosen, boolean ``_TE``)."""
        if padding_mask is not None:
            raise NotImplementedError("padding masks are not supported; pass full samples")
        x_TD = hidden_SBD.flatten(0, -2)
        if self.router.needs_experts and not self.site.decided:
            raise HostError(
                (
                    f"router {self.router.name} uses expert outputs, which the MoELayer "
                    "of megatron-core does not support"
                ),
                remedy="use megatron_hyperrouter.engines.megatron.routed.RoutedMoELayer as the module of "
                "the layer spec",
            )
        routing = self.site.routing(x_TD)
        zeros_TE = torch.zeros_like(routing.logits_TE)
        weights_TE = zeros_TE.scatter(1, routing.experts_TK, routing.weights_TK)
        chosen_TE = zeros_TE.bool().scatter(1, routing.experts_TK, True)
        dropless = self.dropless or self.clock.dropless
        if self.config.moe_expert_capacity_factor is not None and not dropless:
            chosen_TE = self._kept(weights_TE.detach(), chosen_TE, routing.experts_TK.numel())
            weights_TE = weights_TE * chosen_TE
        return self.with_losses(weights_TE, routing), chosen_TE

    def with_losses(self, value: Tensor, routing: Routing) -> Tensor:
        """``value``, through which the router's losses join the graph."""
        if not (self.training and routing.losses):
            return value
        loss = total_loss(routing, value.device)
        # A host that divides the gradients by the number of tokens divides this loss, a mean already, as well
        # (router.py:417).
        loss = loss * routing.logits_TE.size(0) if self.config.calculate_per_token_loss else loss
        joined: Tensor = MoEAuxLossAutoScaler.apply(value, loss)
        return joined

    def kept_TK(self, routing: Routing) -> Tensor | None:
        """The routes that the capacity leaves; None if nothing is dropped."""
        factor = self.config.moe_expert_capacity_factor
        if factor is None or self.clock.dropless:
            return None
        return kept_routes(routing, math.ceil(routing.experts_TK.numel() / self.router.num_experts * factor))

    def _kept(self, weights_TE: Tensor, chosen_TE: Tensor, routes: int) -> Tensor:
        """The routes of this rank that each expert's capacity allows: in this host the router drops tokens
        (router.py:587).
        """
        capacity = math.ceil(routes / self.router.num_experts * self.config.moe_expert_capacity_factor)
        by_weight = self.config.moe_token_drop_policy == "probs"
        kept_TE = heaviest(weights_TE if by_weight else chosen_TE.float(), capacity)
        return kept_TE if self.config.moe_pad_expert_input_to_capacity else kept_TE & chosen_TE
