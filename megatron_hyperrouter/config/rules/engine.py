"""Rules about the engines: combinations that an engine computes wrongly, refuses, or does not support."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import NamedTuple

from megatron_hyperrouter.config.derived import (
    has_dense_layers,
    has_hypernetwork,
    has_uneven_stages,
    longest_dense_run,
    moe_layers,
    replicas,
    stage_layers,
)
from megatron_hyperrouter.config.leaves import tree_leaves, value_of
from megatron_hyperrouter.config.rules.base import Rule, broken, multiples
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import Problem

_NEED_EXPERTS = "the deepspeed engine needs experts in every stage"


class Missing(NamedTuple):
    """A feature that an engine does not have: the setting that asks for it, when it does, its name, and the
    remedy.
    """

    name: str
    asked_for: Callable[[RunConfig], bool]
    what: str
    remedy: str


def _on_deepspeed(asked_for: Callable[[RunConfig], bool]) -> Callable[[RunConfig], bool]:
    return lambda config: config.engine.engine == "deepspeed" and asked_for(config)


MISSING: tuple[Missing, ...] = (
    Missing(
        "context_parallel_size",
        _on_deepspeed(lambda c: c.parallel.context_parallel_size > 1),
        "context parallelism",
        "use --context-parallel-size 1, or --engine megatron",
    ),
    Missing(
        "virtual_pipeline_model_parallel_size",
        _on_deepspeed(lambda c: (c.parallel.virtual_pipeline_model_parallel_size or 1) > 1),
        "the interleaved pipeline schedule",
        "leave out FLAG, or use --engine megatron",
    ),
)


def in_this_version(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Missing features are refused, not ignored."""
    for row in MISSING:
        if row.asked_for(config):
            yield broken(config, row.name, f"the deepspeed engine does not support {row.what}", row.remedy)


def zero_3_with_experts(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """DeepSpeed 0.19.8 asserts that its own MoE layers are not used with ZeRO-3 (runtime/engine.py:2215)."""
    if config.engine.engine == "deepspeed" and config.engine.zero_stage == 3:
        best = 1 if config.parallel.pipeline_model_parallel_size > 1 else 2
        yield broken(
            config,
            "zero_stage",
            "is not supported by DeepSpeed's mixture-of-experts layers",
            f"use --zero-stage {best}",
        )


def zero_2_without_pipeline(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """DeepSpeed's pipeline engine asserts ZeRO < 2 (runtime/pipe/engine.py:76)."""
    if (
        config.engine.engine == "deepspeed"
        and config.engine.zero_stage == 2
        and config.parallel.pipeline_model_parallel_size > 1
    ):
        yield broken(
            config, "zero_stage", "cannot be combined with pipeline parallelism", "use --zero-stage 1"
        )


def zero_0_alone(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Without ZeRO, the gradient norm covers only the parameters of one rank (DeepSpeed 0.19.8 gives wrong
    norms: 4.32783 instead of 4.32807).
    """
    if config.engine.engine != "deepspeed" or config.engine.zero_stage != 0:
        return
    parallel = config.parallel
    if (
        max(
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.expert_model_parallel_size,
        )
        > 1
    ):
        rule = "gives wrong gradient norms in DeepSpeed with tensor, pipeline or expert parallelism"
        yield broken(config, "zero_stage", rule, "use --zero-stage 1")


def zero_0_in_float32(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Without ZeRO, DeepSpeed 0.19.8 adds up bfloat16 gradients in bfloat16 (norm 0.6097 for 0.6525;
    runtime/engine.py:2323).
    """
    if config.engine.engine == "deepspeed" and config.engine.zero_stage == 0 and config.train.bf16:
        rule = "sums gradients in bfloat16 with --bf16, which makes gradient norms wrong"
        yield broken(config, "zero_stage", rule, "use --zero-stage 1")


def settings_of_the_other_engine(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """A setting that only the other engine reads would be silently ignored."""
    engine = config.engine.engine
    for leaf in tree_leaves().values():
        owner = leaf.only
        if owner is None or owner.engine == engine or owner.harmless:
            continue
        if value_of(config, leaf.name) != leaf.default:
            rule = f"works only on the {owner.engine} engine, but this run uses the {engine} engine"
            yield broken(config, leaf.name, rule, owner.remedy)


def hypernetwork_over_ranks(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Each of the ranks with the same dense parameters holds equally many columns of the hypernetwork."""
    if not config.engine.shard_hypernetwork:
        return
    if not has_hypernetwork(config):
        rule = f"needs --router.name hyper: the router {config.router.name} has no hypernetwork"
        yield broken(config, "shard_hypernetwork", rule, "leave out FLAG")
        return
    size, ranks = config.model.hidden_size, 1 if world_size is None else replicas(config, world_size)
    if ranks and size % ranks:
        rule = (
            f"needs --hidden-size = {size} to be divisible by data-parallel x context-parallel ranks "
            f"= {ranks}"
        )
        remedy = f"leave out FLAG, or use --hidden-size {multiples(size, ranks)}"
        yield broken(config, "shard_hypernetwork", rule, remedy)


def stages_have_experts(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """DeepSpeed computes a norm for each group of parameters.  A stage without experts has one group
    fewer, so the stages would deadlock (0.19.8, runtime/zero/stage_1_and_2.py:2951).
    """
    stages = config.parallel.pipeline_model_parallel_size
    if config.engine.engine != "deepspeed" or stages == 1 or not has_dense_layers(config):
        return
    if has_uneven_stages(config):
        yield from _named_stages_have_experts(config)
        return
    dense, smallest = longest_dense_run(config), config.model.num_layers // stages
    if dense >= smallest:
        rule = f"has {dense} dense layers in a row, so a stage of {smallest} layers may have no experts"
        remedy = "use fewer pipeline stages, or --engine megatron"
        yield broken(config, "moe_layer_freq", f"{rule}; {_NEED_EXPERTS}", remedy)


def _named_stages_have_experts(config: RunConfig) -> Iterator[Problem]:
    try:
        sizes, routed = stage_layers(config), moe_layers(config)
    except ValueError:  # another rule reports it
        return
    ends = list(accumulate(sizes))
    for stage, (size, end) in enumerate(zip(sizes, ends, strict=True), start=1):
        if not any(routed[end - size : end]):
            layers = f"layers {end - size + 1} to {end}" if size > 1 else f"layer {end}"
            rule = f"has no experts in pipeline stage {stage} ({layers})"
            remedy = "change the number of layers in the stages, or use --engine megatron"
            yield broken(config, "moe_layer_freq", f"{rule}; {_NEED_EXPERTS}", remedy)


RULES: tuple[Rule, ...] = (
    stages_have_experts,
    in_this_version,
    zero_3_with_experts,
    zero_2_without_pipeline,
    zero_0_alone,
    zero_0_in_float32,
    settings_of_the_other_engine,
    hypernetwork_over_ranks,
)
