"""Our routers in a caller's own megatron-core model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hyperrouter.engines.megatron.router import MegatronRouter
from megatron_hyperrouter.engines.world import device
from megatron_hyperrouter.errors import ConfigError, Problem
from megatron_hyperrouter.routers import build_router
from megatron_hyperrouter.routers.base import Router, RunFacts
from megatron_hyperrouter.routers.options import router_class

RouterBuilder = Callable[..., MegatronRouter]

# Fields that describe how the stock router chooses; ours would not do what they ask. The values are the
# defaults.
_STOCK_ONLY: tuple[tuple[str, object], ...] = (
    ("moe_router_score_function", "softmax"),
    ("moe_router_num_groups", None),
    ("moe_router_group_topk", None),
    ("moe_router_topk_scaling_factor", None),
    ("moe_router_enable_expert_bias", False),
    ("moe_router_force_load_balancing", False),
    ("moe_router_padding_for_quantization", False),
    ("moe_enable_routing_replay", False),
    ("moe_input_jitter_eps", None),
)


def megatron_router_builder(
    name: str, *, seed: int = 1234, facts: RunFacts | None = None, **options: Any
) -> RouterBuilder:
    """What megatron-core calls to build the router of each MoE layer.

    ``MoESubmodules(experts=..., router=megatron_router_builder("hyper"))`` puts it into a layer spec.

    The model's ``TransformerConfig`` says the rest: ``hidden_size``, ``num_moe_experts``,
    ``moe_router_topk``, ``moe_aux_loss_coeff`` (with ``moe_router_load_balancing_type`` "aux_loss" or
    "none"), ``moe_z_loss_coeff``, ``moe_expert_capacity_factor`` and how to drop. The losses join the graph
    by themselves, as those of the stock router do.  Layers differ by their number in the whole model.
    ``options``: fields of the router's ``Config``.  ``facts``: layers, steps and vocabulary of the model's
    run, for routers that go by them (``competesmoe``, ``stablemoe``); by default the model's layers.

    ``competesmoe`` and ``simsmoe`` consult the experts: they need ``engines.megatron.routed.RoutedMoELayer``
    in the place of ``MoELayer``, and experts that are modules of their own (``SequentialMLP``).  A few
    options need more than forward passes: the ids or places of tokens, or what all ranks chose in a step
    (``simsmoe``, ``stablemoe``; ``topk`` with ``expert_bias``, ``jitter_eps`` or another ``aux_loss``).  The
    caller brings that by a :class:`RouterSteps`; a warning says so.

    The router derives its weights in each forward pass, so they are never stale.  Where it follows the step
    (schedules), make a :class:`RouterSteps` of the model, or set ``layer.mlp.router.clock.step`` before each
    step: it counts completed ones and stays 0 by itself.

    Raises ConfigError, with every problem at once: for an unknown router here, for the rest when a layer is
    built.
    """
    router_class(name)

    def builder(
        *, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, **_: object
    ) -> MegatronRouter:
        if problems := list(_problems(config)):
            raise ConfigError(problems)
        return MegatronRouter(config, pg_collection, make=partial(_make, config, name, seed, facts, options))

    return builder


def _make(
    config: TransformerConfig,
    name: str,
    seed: int,
    facts: RunFacts | None,
    options: dict[str, Any],
    layer_number: int,
) -> Router:
    balanced = config.moe_router_load_balancing_type == "aux_loss"
    router = build_router(
        name,
        hidden_size=config.hidden_size,
        num_experts=config.num_moe_experts,
        topk=config.moe_router_topk,
        layer_number=layer_number,
        seed=seed,
        aux_loss_coeff=config.moe_aux_loss_coeff if balanced else 0.0,
        z_loss_coeff=config.moe_z_loss_coeff or 0.0,
        facts=facts or RunFacts(num_layers=config.num_layers),
        **options,
    )
    for lost in router.config.unserved():
        warnings.warn(lost, stacklevel=2)
    # megatron-core makes its parameters where they are used, unless it is told not to.
    return router if config.use_cpu_initialization else router.to(device())


def _problems(config: TransformerConfig) -> Iterator[Problem]:
    balancing = config.moe_router_load_balancing_type
    if balancing not in ("aux_loss", "none"):
        yield Problem(
            "moe_router_load_balancing_type",
            balancing,
            'must be "aux_loss" or "none"',
            "the router has one balance loss",
        )
    for field, default in _STOCK_ONLY:
        value = getattr(config, field, default)
        if value != default:
            yield Problem(
                field, value, "is a setting of megatron-core's own router", f"leave it at {default}"
            )
    if config.moe_router_pre_softmax and config.moe_router_topk > 1:  # at k = 1 megatron-core insists on it
        yield Problem(
            "moe_router_pre_softmax",
            True,
            "the router takes the softmax over the chosen experts",
            "leave it at False",
        )
