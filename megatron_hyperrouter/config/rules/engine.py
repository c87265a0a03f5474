"""Rules about the engines: combinations that they compute wrongly, refuse, or do not do in this version."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from megatron_hyperrouter.config.rules.base import Rule, broken
from megatron_hyperrouter.config.tree import EngineConfig, RunConfig
from megatron_hyperrouter.errors import Problem


class Missing(NamedTuple):
    """Something that this version does not do: the setting that asks for it, on which engine, and what to do instead."""

    name: str
    asked_for: Callable[[RunConfig], bool]
    what: str
    remedy: str


def _on_deepspeed(asked_for: Callable[[RunConfig], bool]) -> Callable[[RunConfig], bool]:
    return lambda config: config.engine.engine == "deepspeed" and asked_for(config)


MISSING: tuple[Missing, ...] = (
    Missing(
        "tensor_model_parallel_size",
        _on_deepspeed(lambda c: c.parallel.tensor_model_parallel_size > 1),
        "tensor parallelism on the deepspeed engine",
        "use 1, and expert or pipeline parallelism",
    ),
    Missing(
        "expert_tensor_parallel_size",
        _on_deepspeed(lambda c: (c.parallel.expert_tensor_parallel_size or 1) > 1),
        "tensor parallelism inside experts on the deepspeed engine",
        "use 1, or leave it out",
    ),
    Missing(
        "sequence_parallel",
        _on_deepspeed(lambda c: c.parallel.sequence_parallel),
        "sequence parallelism on the deepspeed engine",
        "leave it out",
    ),
    Missing(
        "context_parallel_size",
        _on_deepspeed(lambda c: c.parallel.context_parallel_size > 1),
        "context parallelism on the deepspeed engine",
        "use 1",
    ),
    Missing(
        "virtual_pipeline_model_parallel_size",
        _on_deepspeed(lambda c: (c.parallel.virtual_pipeline_model_parallel_size or 1) > 1),
        "the interleaved pipeline schedule on the deepspeed engine",
        "leave it out; plain pipeline parallelism is there",
    ),
)


def in_this_version(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """What is planned and not built yet is refused, rather than ignored."""
    for row in MISSING:
        if row.asked_for(config):
            yield broken(config, row.name, f"this version does not do {row.what}", row.remedy)


def zero_0_alone(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Without ZeRO, DeepSpeed 0.19.8 takes the gradient norm of experts and of stages apart, and clips by it."""
    parallel = config.parallel
    spread = parallel.expert_model_parallel_size > 1 or parallel.pipeline_model_parallel_size > 1
    if config.engine.engine == "deepspeed" and config.engine.zero_stage == 0 and spread:
        rule = "takes wrong gradient norms with expert or pipeline parallelism"
        yield broken(config, "zero_stage", rule, "use --zero-stage 1")


def zero_0_in_float32(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Without ZeRO, DeepSpeed 0.19.8 adds up bfloat16 gradients in bfloat16, and refuses float32 (runtime/engine.py:2323)."""
    if config.engine.engine == "deepspeed" and config.engine.zero_stage == 0 and config.train.bf16:
        yield broken(config, "zero_stage", "adds up gradients in bfloat16 with --bf16", "use --zero-stage 1")


def zero_2_without_pipeline(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """DeepSpeed's pipeline engine asserts ZeRO < 2 (pipe/engine.py)."""
    if config.engine.engine == "deepspeed" and config.engine.zero_stage == 2 and config.parallel.pipeline_model_parallel_size > 1:
        yield broken(config, "zero_stage", "does not go with pipeline parallelism", "use --zero-stage 1")


def settings_of_the_other_engine(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """A setting that only the other engine reads would be silently ignored."""
    if config.engine.engine == "deepspeed":
        if config.optimizer.use_distributed_optimizer:
            rule = "belongs to the megatron engine, and the engine is deepspeed"
            yield broken(config, "use_distributed_optimizer", rule, "use --zero-stage 1, which does the same")
        return
    for name in ("zero_stage", "deepspeed_config"):
        if getattr(config.engine, name) != getattr(EngineConfig(), name):
            yield broken(config, name, "belongs to the deepspeed engine, and the engine is megatron", "leave it out")


RULES: tuple[Rule, ...] = (in_this_version, zero_0_alone, zero_0_in_float32, zero_2_without_pipeline, settings_of_the_other_engine)
