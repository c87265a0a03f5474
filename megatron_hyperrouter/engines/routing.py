"""What both engines need of routers: building them for a run, their schedule and their losses.

Legend: ``T`` tokens of one micro-batch, ``E`` experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.row_gather import data_ranks
from megatron_hyperrouter.engines.world import device
from megatron_hyperrouter.model.names import router_prefix
from megatron_hyperrouter.ops import keyed
from megatron_hyperrouter.ops.schedule import topk_at
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.routers.base import Router, Routing, RunFacts


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


def make_router(config: RunConfig, layer_number: int, *, vocab_size: int) -> Router:
    """The run's router for the layer ``layer_number`` (from 1); its trained parameters are drawn by global
    name.

    ``vocab_size``: number of token ids.
    """
    place = device()
    # What is frozen is drawn where it is used; nothing else says where on a machine without a GPU.
    with place if place.type == "cuda" else contextlib.nullcontext():
        router = ROUTERS[config.router.name](
            config.router.options,
            hidden_size=config.model.hidden_size,
            num_experts=config.model.num_experts,
            topk=topk_schedule(config),
            layer_number=layer_number,
            seed=config.train.seed,
            aux_loss_coeff=config.model.moe_aux_loss_coeff,
            z_loss_coeff=config.model.moe_z_loss_coeff,
            facts=RunFacts(
                num_layers=config.model.num_layers,
                train_iters=config.train.train_iters,
                vocab_size=vocab_size,
                data_ranks=data_ranks(config),
            ),
        )
    prefix = router_prefix(layer_number, config.model.num_layers)
    router.reset_parameters(
        lambda name, shape: keyed.normal(shape, seed=config.train.seed, name=prefix + name)
    )
    return router


def total_loss(routing: Routing, device: torch.device) -> Tensor:
    """Sum of a router's losses, which include their coefficients; a float32 scalar."""
    values = [value.float() for value in routing.losses.values()]
    return sum(values[1:], values[0]) if values else torch.zeros((), dtype=torch.float32, device=device)


def heaviest(score_TE: Tensor, capacity: int) -> Tensor:
    """True for the ``capacity`` largest scores of each expert (Megatron's "probs" policy); boolean
    ``_TE``.

    Of equal scores, which all routes have at k = 1, the earlier tokens come first; with ``torch.topk``
    this would depend on the device.
    """
    first_CE = score_TE.sort(dim=0, descending=True, stable=True).indices[:capacity]
    return torch.zeros_like(score_TE, dtype=torch.bool).scatter_(0, first_CE, True)


def kept_routes(routing: Routing, capacity: int) -> Tensor:
    """The routes that the capacity of each expert allows, those with the largest weights first; boolean
    ``_TK``.
    """
    weights_TE = torch.zeros_like(routing.logits_TE)
    weights_TE = weights_TE.scatter(1, routing.experts_TK, routing.weights_TK.detach())
    return heaviest(weights_TE, capacity).gather(1, routing.experts_TK)


def draw_by_name(seed: int) -> Callable[[str, tuple[int, ...]], Tensor]:
    """Initial numbers of a weight, N(0, 1): a function of (seed, global name) only, drawn on this rank's
    device.
    """
    return lambda name, shape: keyed.normal(shape, seed=seed, name=name, device=device())
