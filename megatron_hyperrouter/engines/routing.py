"""What both engines need of routers: building them for a run, the clock that they follow, and the statistics of their choices.

Legend: ``T`` tokens of one micro-batch, ``L`` MoE layers, ``E`` experts, ``K`` active experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.ops import keyed
from megatron_hyperrouter.ops.balance import entropy, load, switch_loss, z_loss
from megatron_hyperrouter.ops.schedule import topk_at
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.routers.base import Router, Routing


def topk_schedule(config: RunConfig) -> Callable[[int], int]:
    """k as a function of completed steps."""
    end = config.model.moe_router_topk
    schedule = config.topk
    return partial(
        topk_at,
        start=end if schedule.topk_start is None else schedule.topk_start,
        end=end,
        steps=schedule.topk_schedule_steps or config.train.train_iters,
        kind=schedule.topk_schedule,
    )


def make_router(config: RunConfig, layer_number: int) -> Router:
    """The run's router for the layer ``layer_number`` (from 1), its trained parameters drawn by global name."""
    router = ROUTERS[config.router.name](
        config.router.options,
        hidden_size=config.model.hidden_size,
        num_experts=config.model.num_experts,
        topk=topk_schedule(config),
        layer_number=layer_number,
        seed=config.train.seed,
        aux_loss_coeff=config.model.moe_aux_loss_coeff,
        z_loss_coeff=config.model.moe_z_loss_coeff,
    )
    prefix = f"decoder.layers.{layer_number - 1}.mlp.router."
    router.reset_parameters(lambda name, shape: keyed.normal(shape, seed=config.train.seed, name=prefix + name))
    return router


def total_loss(routing: Routing, device: torch.device) -> Tensor:
    """Sum of a router's losses, which carry their coefficients; a float32 scalar."""
    if not routing.losses:
        return torch.zeros((), dtype=torch.float32, device=device)
    return torch.stack([value.float() for value in routing.losses.values()]).sum()


def heaviest(score_TE: Tensor, capacity: int) -> Tensor:
    """True for the ``capacity`` largest scores of each expert (Megatron's "probs" policy); boolean ``_TE``.

    Equal scores, which k = 1 gives to all routes, go to the earlier tokens; ``torch.topk`` would leave the choice to the device.
    """
    first_CE = score_TE.sort(dim=0, descending=True, stable=True).indices[:capacity]
    return torch.zeros_like(score_TE, dtype=torch.bool).scatter_(0, first_CE, True)


def draw_by_name(seed: int) -> Callable[[str, tuple[int, ...]], Tensor]:
    """Initial numbers of a weight, N(0, 1): a function of (seed, global name) alone."""
    return lambda name, shape: keyed.normal(shape, seed=seed, name=name)


@dataclass
class Clock:
    """The step that routers follow: set by the engine before each step, read by the layers."""

    step: int = 0  # completed optimizer steps
    topk: int | None = None  # overrides the schedule while evaluating


class RouterStatistics:
    """Sums over one step of what the routers chose, one row a layer, ready for a single all-reduce.

    A row holds the load of each expert, then the sums over tokens and over micro-batches that ``_TAIL`` names.
    """

    _TAIL = ("entropy_sum", "tokens", "aux_sum", "z_sum", "micro_batches")

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self.sums: Tensor = torch.zeros(num_layers, num_experts + len(self._TAIL), dtype=torch.float64)
        self.enabled = True

    @torch.no_grad()
    def record(self, layer_number: int, routing: Routing, over_shards: Callable[[Tensor], Tensor] | None = None) -> None:
        """Add one micro-batch; the second forward pass of activation checkpointing is left out.

        ``over_shards`` sums over the ranks that share the micro-batch: each then adds its part of the means.
        """
        if not self.enabled or torch._C._current_graph_task_id() != -1:  # inside backward(): a recomputation
            return
        logits_TE, experts_TK = routing.logits_TE.detach(), routing.experts_TK
        if self.sums.device != logits_TE.device:
            self.sums = self.sums.to(logits_TE.device)
        load_E = load(experts_TK, self.num_experts)
        whole_E = load_E if over_shards is None else over_shards(load_E)
        part = load_E.sum(dtype=torch.float64) / whole_E.sum()  # of the micro-batch's tokens
        tokens = logits_TE.size(0)
        tail = (
            entropy(logits_TE) * tokens,
            part.new_full((), tokens),  # filled where it is: a number copied to a GPU would make the host wait
            switch_loss(logits_TE.softmax(-1), experts_TK, lambda _: whole_E),
            z_loss(logits_TE) * part,
            part,
        )
        row = self.sums[layer_number - 1]
        row[: self.num_experts] += load_E
        row[self.num_experts :] += torch.stack([value.double() for value in tail])

    def take(self) -> Tensor:
        """The sums so far; starts afresh."""
        sums, self.sums = self.sums, torch.zeros_like(self.sums)
        return sums

    def summary(self, sums: Tensor) -> dict[str, list[float]]:
        """Per layer, from sums over all ranks: entropy (nats), load_max_over_mean, aux and z (before coefficients)."""
        load_LE, tail = sums[:, : self.num_experts], dict(zip(self._TAIL, sums[:, self.num_experts :].unbind(1), strict=True))
        return {
            "entropy": (tail["entropy_sum"] / tail["tokens"]).tolist(),
            "load_max_over_mean": (load_LE.amax(1) / load_LE.mean(1)).tolist(),
            "aux": (tail["aux_sum"] / tail["micro_batches"]).tolist(),
            "z": (tail["z_sum"] / tail["micro_batches"]).tolist(),
        }
