"""megatron-core's ``MoELayer`` for routers that consult the experts.

Legend: ``T`` tokens on this rank, ``D`` hidden size, ``E`` experts of the whole model, ``K`` active
experts, ``R = T * K`` routes, ``N`` ranks that share the experts, ``G`` expert-parallel ranks among them,
``L`` experts on each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.clock import single_routes, spread_out, weighted_sum
from megatron_hyperrouter.engines.grouped import GroupedExperts, sharing_of
from megatron_hyperrouter.engines.megatron.router import MegatronRouter
from megatron_hyperrouter.engines.row_gather import rows_of_all
from megatron_hyperrouter.errors import HostError


class StackedExperts(GroupedExperts):
    """Grouped experts as ``MoELayer`` builds its experts, with the marks that megatron-core's layers set."""

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, *, run: RunConfig, **_: object
    ) -> None:
        """``run``: the settings from which ``config`` was made."""
        super().__init__(run, sharing_of(run))
        for parameter, cut in ((self.linear_fc1_LGD, 1), (self.linear_fc2_LDF, 2)):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=cut, stride=1)
            parameter.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """Both parameters, once the host has gathered them: its overlap waits for them in the hooks before
        the forward pass of a module, which our layers do not call.
        """
        for hook in self._forward_pre_hooks.values():
            hook(self, ())
        return super()._matrices()


class RoutedMoELayer(MoELayer):
    """Implements ``ExpertBank``, and gives the router the outputs of the experts that it chose."""

    use_shared_expert: bool  # the host's

    router: MegatronRouter
    _autocast: bool = False  # of the current pass

    def forward(self, hidden_states: Tensor, *more: Any, **kwargs: Any) -> Any:
        """Like ``MoELayer.forward`` (moe_layer.py:383), but dispatches once, as the router decides;
        padding goes to no expert.
        """
        rows_R = self.router.site.real_rows()
        if rows_R is None:
            return self._routed(hidden_states, *more, **kwargs)
        # The shared expert may need the positions of all tensor-parallel ranks in equal parts.
        shared = self.shared_experts_compute(hidden_states)
        real_R1D = hidden_states.flatten(0, -2).index_select(0, rows_R).unsqueeze(1)
        with self._without_shared():
            output_R1D, _ = self._routed(real_R1D, *more, **kwargs)
        output = spread_out(output_R1D.squeeze(1), rows_R, hidden_states)
        return output if shared is None else output + shared, None

    def _routed(self, hidden_states: Tensor, *more: Any, **kwargs: Any) -> Any:
        """Without padding: every vector is a token."""
        router = self.router
        if isinstance(self.experts, GroupedExperts) and self.config.moe_token_dispatcher_type == "alltoall":
            if self.moe_layer_recompute and self.training:
                return tensor_parallel.checkpoint(self._stacked, False, hidden_states), None
            return self._stacked(hidden_states), None
        if not router.router.needs_experts:
            return super().forward(hidden_states, *more, **kwargs)
        self._refuse()
        self._autocast = torch.is_autocast_enabled(hidden_states.device.type)
        x_TD = hidden_states.flatten(0, -2)
        routing, now = router.site.route(x_TD, experts=self)
        if not router.router.wants_outputs(now):
            with router.site.given(routing):
                return super().forward(hidden_states, *more, **kwargs)
        if any(value is not None for value in (*more, *kwargs.values())):
            raise NotImplementedError(
                "padding masks and other optional arguments are not supported; pass full samples"
            )
        routes_R1D = x_TD.repeat_interleave(routing.experts_TK.size(1), 0).unsqueeze(1)
        shared = self.shared_experts_compute(hidden_states)
        with router.site.given(single_routes(routing)), self._one_expert_each():
            outputs_R1D, _ = super().forward(routes_R1D)
        outputs_TKD = outputs_R1D.view(*routing.experts_TK.shape, -1)
        routing = router.router.combine(routing, x_TD, outputs_TKD, now)
        output_TD = router.with_losses(weighted_sum(routing.weights_TK, outputs_TKD), routing)
        output = output_TD.view(hidden_states.shape)
        return output if shared is None else output + shared, None

    def _stacked(self, hidden: Tensor) -> Tensor:
        """With our own exchange of tokens, which pads nothing and waits for at most one number."""
        x_TD, router = hidden.flatten(0, -2), self.router
        routing, now = router.site.route(x_TD, experts=self)
        if router.router.wants_outputs(now):
            outputs_TKD = self.experts.outputs_TKD(x_TD, routing.experts_TK)
            routing = router.router.combine(routing, x_TD, outputs_TKD, now)
            output_TD = weighted_sum(routing.weights_TK, outputs_TKD)
        else:
            kept_TK = router.kept_TK(routing)
            output_TD = self.experts.weighted(x_TD, routing.weights_TK, routing.experts_TK, kept_TK)
        output = router.with_losses(output_TD, routing).view(hidden.shape)
        shared = self.shared_experts_compute(hidden)
        return output if shared is None else output + shared

    @torch.no_grad()
    def scores_TE(self, x_TD: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
        """See :class:`megatron_hyperrouter.routers.base.ExpertBank`: tokens go to the experts, scores
        alone come back.
        """
        sharers, parts = self.token_dispatcher.tp_ep_group, self.token_dispatcher.tp_group
        all_TD = rows_of_all(x_TD, sharers)
        columns = []
        for expert in self.experts.local_experts:
            scores = []
            for rows_TD in all_TD.split(x_TD.size(0)):  # hidden units of one rank's tokens at a time
                # the router's maths around it is without
                with torch.autocast(x_TD.device.type, enabled=self._autocast):
                    output_TD, _ = expert(rows_TD)
                # each rank has a partial sum: it must be whole before a score, which is not linear
                if parts.size() > 1:
                    dist.all_reduce(output_TD, group=parts)
                scores.append(score(output_TD.float()))
            columns.append(torch.cat(scores))
        local_TL = torch.stack(columns, -1)
        all_GTL = rows_of_all(local_TL.unsqueeze(0), self.token_dispatcher.ep_group)
        first = sharers.rank() * x_TD.size(0)
        return all_GTL[:, first : first + x_TD.size(0)].transpose(0, 1).flatten(1)

    def _refuse(self) -> None:
        """HostError for settings of your own model that would ignore a given decision, or add something to an
        expert's output.
        """
        found = {
            "moe_shared_expert_overlap": self.shared_expert_overlap,
            "moe_latent_size": bool(self.config.moe_latent_size),
            "moe_pad_expert_input_to_capacity": self.config.moe_pad_expert_input_to_capacity,
            'recompute_modules with "moe"': self.moe_layer_recompute,
        }
        if names := [name for name, there in found.items() if there]:
            raise HostError(
                f"router {self.router.router.name} uses expert outputs, which cannot be combined with "
                f"{', '.join(names)}",
                remedy="leave these settings out, or use a router that does not use expert outputs",
            )

    @contextmanager
    def _one_expert_each(self) -> Iterator[None]:
        """Within this context, one route a token, nothing is dropped, and no shared expert is added."""
        topk = self.config.moe_router_topk
        self.set_topk(1)
        self.router.dropless = True
        try:
            with self._without_shared():
                yield
        finally:
            self.set_topk(topk)
            self.router.dropless = False

    @contextmanager
    def _without_shared(self) -> Iterator[None]:
        shared, self.use_shared_expert = self.use_shared_expert, False
        try:
            yield
        finally:
            self.use_shared_expert = shared

    def set_topk(self, topk: int) -> None:
        """Dispatchers take k from the configuration and from themselves (token_dispatcher.py:234, 487,
        1161).
        """
        self.config.moe_router_topk = topk
        dispatcher = self.token_dispatcher
        if hasattr(dispatcher, "router_topk"):
            dispatcher.router_topk = topk
        # flex: each expert counts once for each of its TP ranks (:1351)
        manager = getattr(dispatcher, "_comm_manager", None)
        if manager is not None and hasattr(manager, "router_topk"):
            manager.router_topk = topk * dispatcher.tp_size
