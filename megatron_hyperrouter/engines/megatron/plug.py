"""Our routers in your own megatron-core model."""

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

# Fields that describe how the stock router chooses, which our routers do not support; with their defaults.
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
    """Return a function with which megatron-core builds the router of each MoE layer.

    To put the routers into your model, pass the function to the layer spec:
    ``MoESubmodules(experts=..., router=megatron_router_builder("hyper"))``.

    The router takes its other settings from the model's ``TransformerConfig``: ``hidden_size``,
    ``num_moe_experts``, ``moe_router_topk``, ``moe_aux_loss_coeff`` (``moe_router_load_balancing_type``
    must be ``"aux_loss"`` or ``"none"``), ``moe_z_loss_coeff``, ``moe_expert_capacity_factor`` and the drop
    policy.  As with megatron-core's own router, the router's losses enter the backward pass automatically.
    The weights of a router depend on the number of its layer in the whole model.

    If the router depends on the step, create a ``RouterSteps`` for the model.  Alternatively, set
    ``layer.mlp.router.clock.step`` to the number of completed steps before each step.  A warning tells you
    if the router needs more than the step, and therefore a ``RouterSteps``.

    ``competesmoe`` and ``simsmoe`` run the experts themselves.  Use ``RoutedMoELayer`` from
    ``megatron_hyperrouter.engines.megatron.routed`` instead of ``MoELayer``, and experts that are separate
    modules (``SequentialMLP``).

    Args:
        name: name of the router, such as ``"hyper"``; ``ROUTERS`` has all names.
        seed: random seed.
        facts: number of layers, steps and token ids, needed by ``competesmoe`` and ``stablemoe``; by default
            only the model's number of layers.
        **options: the options of the router, as for ``build_router``.

    Raises:
        ConfigError: the router is unknown.  If an option or a setting of the model is wrong, the function
            that is returned raises ConfigError when megatron-core builds a layer.
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
    # By default, megatron-core creates its parameters on the device that uses them.
    return router if config.use_cpu_initialization else router.to(device())


def _problems(config: TransformerConfig) -> Iterator[Problem]:
    balancing = config.moe_router_load_balancing_type
    if balancing not in ("aux_loss", "none"):
        yield Problem(
            "moe_router_load_balancing_type",
            balancing,
            'must be "aux_loss" or "none"',
            "use one of these two: the router has only one balance loss",
        )
    for field, default in _STOCK_ONLY:
        value = getattr(config, field, default)
        if value != default:
            yield Problem(
                field,
                value,
                ("applies only to the router of megatron-core"),
                f"set it to its default, {default}",
            )
    if config.moe_router_pre_softmax and config.moe_router_topk > 1:  # at k = 1 megatron-core insists on it
        yield Problem(
            "moe_router_pre_softmax",
            True,
            "must be False, because the router applies softmax to the chosen experts",
            "set it to False",
        )
