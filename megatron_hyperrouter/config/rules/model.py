"""Rules about the shape of the model and its experts."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_hyperrouter.config.derived import head_width, moe_layers, query_groups
from megatron_hyperrouter.config.rules.base import Rule, broken, indivisible, multiples, needs
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import Problem


def hidden_size_by_heads(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Heads share the hidden size evenly, unless their width is set."""
    if config.model.kv_channels is None:
        yield from indivisible(config, "hidden_size", "num_attention_heads")


def heads_by_query_groups(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Every key/value head must have the same number of query heads."""
    yield from indivisible(config, "num_attention_heads", "num_query_groups", divisor=query_groups(config))


def head_width_is_even(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """RoPE rotates pairs of channels."""
    width = head_width(config)
    if width % 2 == 0:
        return
    if config.model.kv_channels is not None:
        yield broken(
            config,
            "kv_channels",
            "must be even for rotary embeddings",
            f"use {multiples(width, 2)}",
        )
    elif (
        config.model.hidden_size % config.model.num_attention_heads == 0
    ):  # otherwise that is the problem to report
        rule = (
            f"gives {config.model.num_attention_heads} heads of width {width}, which must be even for "
            "rotary embeddings"
        )
        yield broken(
            config,
            "hidden_size",
            rule,
            f"use {config.model.num_attention_heads * (width + 1)}, or set --kv-channels",
        )


def topk_within_experts(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """k <= E, or the experts of the groups that a token may use; at the schedule's end and at its start."""
    experts, options = config.model.num_experts, config.router.options
    most = options.largest_topk(experts) if hasattr(options, "largest_topk") else experts
    for name, topk in (
        ("moe_router_topk", config.model.moe_router_topk),
        ("topk_start", config.topk.topk_start),
    ):
        if topk is not None and topk > experts:
            rule = f"must be at most --num-experts = {experts}"
            few = "1" if experts == 1 else f"1 to {experts}"
            yield broken(config, name, rule, f"use {few}, or increase --num-experts")
        elif topk is not None and topk > most:
            rule = (
                f"must be at most {most}, the number of experts in --router.group-topk = "
                f"{options.group_topk} groups"
            )
            yield broken(config, name, rule, f"use 1 to {most}, or increase --router.group-topk")


def topk_fields_need_a_schedule(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Without a schedule, its start and its length have no meaning."""
    if config.topk.topk_schedule != "constant":
        return
    for name, value in (
        ("topk_start", config.topk.topk_start),
        ("topk_schedule_steps", config.topk.topk_schedule_steps),
    ):
        if value is not None:
            rule = "needs a schedule, but --topk-schedule is constant"
            yield broken(config, name, rule, "use --topk-schedule linear, or leave out FLAG")


def schedule_needs_a_start(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """A schedule must begin and end at different values of k."""
    if config.topk.topk_schedule != "constant" and config.topk.topk_start is None:
        yield broken(
            config,
            "topk_schedule",
            "needs --topk-start; without it, k never changes",
            "set --topk-start to the k at step 0",
        )


def router_options(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Problems that the router's own rules find in its options."""
    own_rules = getattr(config.router.options, "problems", None)
    if own_rules is not None:
        yield from own_rules(hidden_size=config.model.hidden_size, num_experts=config.model.num_experts)


def layers_have_a_pattern(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The pattern of layers must be readable, fit the number of layers, and leave at least one MoE layer."""
    try:
        routed = any(moe_layers(config))
    except ValueError as error:
        remedy = "write a 1 or a 0 for each layer, or use --moe-layer-freq 1 for experts in every layer"
        yield broken(config, "moe_layer_freq", str(error), remedy)
        return
    if not routed:
        yield broken(
            config, "moe_layer_freq", "leaves no layer with experts", "put at least one 1 in the list"
        )


def shared_expert_gate_needs_its_expert(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The gate needs a shared expert; the residual MLP is a different kind of dense MLP."""
    model = config.model
    if model.moe_shared_expert_gate and model.moe_shared_expert_intermediate_size is None:
        yield needs(config, "moe_shared_expert_gate", "--moe-shared-expert-intermediate-size")
    if model.mlp_type == "residual" and model.moe_shared_expert_intermediate_size is not None:
        rule = "already adds a dense MLP to each MoE layer, so it cannot be combined with a shared expert"
        yield broken(
            config,
            "mlp_type",
            rule,
            "use --mlp-type standard, or leave out --moe-shared-expert-intermediate-size",
        )


RULES: tuple[Rule, ...] = (
    hidden_size_by_heads,
    heads_by_query_groups,
    head_width_is_even,
    topk_within_experts,
    layers_have_a_pattern,
    shared_expert_gate_needs_its_expert,
    topk_fields_need_a_schedule,
    schedule_needs_a_start,
    router_options,
)
