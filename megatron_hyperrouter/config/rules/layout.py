"""Rules about how work is spread over ranks: what must divide what.

Words: TP tensor, PP pipeline, VPP virtual pipeline, CP context, EP expert, ETP expert-tensor parallelism, DP
data-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_hyperrouter.config.derived import (
    data_parallel_size,
    dense_width,
    expert_tensor_size,
    expert_width,
    has_dense_layers,
    has_uneven_stages,
    model_parallel_size,
    query_groups,
    stage_layers,
)
from megatron_hyperrouter.config.leaves import value_of
from megatron_hyperrouter.config.rules.base import Rule, broken, indivisible, multiples
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import Problem


def world_by_layout(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The number of ranks is a multiple of the ranks of one copy of the model."""
    size = model_parallel_size(config)
    if world_size is not None and world_size % size:
        sizes = config.parallel
        parts = (
            sizes.tensor_model_parallel_size,
            sizes.pipeline_model_parallel_size,
            sizes.context_parallel_size,
        )
        rule = "must be divisible by tensor x pipeline x context parallelism = " + " x ".join(map(str, parts))
        yield Problem(
            "ranks started",
            world_size,
            rule,
            f"start a multiple of {size} ranks, or use smaller parallel sizes",
        )


def expert_tensor_parallel_is_all_or_none(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """DeepSpeed shares an expert between all TP ranks, or gives it to one."""
    tensor, expert = config.parallel.tensor_model_parallel_size, expert_tensor_size(config)
    if config.engine.engine == "deepspeed" and expert not in (1, tensor):
        allowed = "1" if tensor == 1 else f"1 or {tensor}"
        rule = f"must be 1 or equal to --tensor-model-parallel-size = {tensor} on the deepspeed engine"
        yield broken(config, "expert_tensor_parallel_size", rule, f"use {allowed}, or --engine megatron")


def data_ranks_by_experts(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """DeepSpeed forms expert-parallel groups from the data-parallel ranks, unless each TP rank has
    different experts.
    """
    if world_size is None or not _experts_over_data_ranks(config):
        return
    ranks = data_parallel_size(config, world_size)
    if ranks % config.parallel.expert_model_parallel_size:
        rule = f"must divide the number of data-parallel ranks, {ranks} (ranks started: {world_size})"
        yield broken(
            config, "expert_model_parallel_size", rule, f"use {divisors(ranks)}, or start more ranks"
        )


def world_by_expert_layout(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Experts have a separate layout over all ranks, which the number of ranks must fit as well."""
    if world_size is None or _experts_over_data_ranks(config):
        return
    parallel = config.parallel
    sizes = (
        parallel.expert_model_parallel_size,
        expert_tensor_size(config),
        parallel.pipeline_model_parallel_size,
    )
    if world_size % math.prod(sizes):
        rule = (
            f"expert x expert-tensor x pipeline parallelism = {' x '.join(map(str, sizes))} must divide "
            f"the {world_size} ranks"
        )
        yield broken(
            config, "expert_model_parallel_size", rule, "use smaller parallel sizes, or start more ranks"
        )


def _experts_over_data_ranks(config: RunConfig) -> bool:
    return (
        config.engine.engine == "deepspeed"
        and expert_tensor_size(config) == config.parallel.tensor_model_parallel_size
    )


def experts_by_expert_parallel(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Each rank has as many experts as the others."""
    yield from indivisible(config, "num_experts", "expert_model_parallel_size")


def heads_by_tensor_parallel(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """TP splits attention by heads, and by key/value heads."""
    yield from indivisible(config, "num_attention_heads", "tensor_model_parallel_size")
    if config.model.num_query_groups is not None:
        yield from indivisible(
            config, "num_query_groups", "tensor_model_parallel_size", value=query_groups(config)
        )


def vocabulary_by_tensor_parallel(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """TP splits the padded vocabulary into equal parts."""
    multiple, ranks = config.model.make_vocab_size_divisible_by, config.parallel.tensor_model_parallel_size
    if multiple % ranks and not config.model.pad_vocab_size_to_tp:
        rule = f"must be divisible by --tensor-model-parallel-size = {ranks}"
        padded = f"add --pad-vocab-size-to-tp to pad to a multiple of {multiple * ranks}, as Megatron-LM does"
        remedy = f"use {multiples(multiple, ranks)}, or {padded}"
        yield broken(config, "make_vocab_size_divisible_by", rule, remedy)


def expert_width_by_tensor_parallel(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """ETP splits the width of an expert; TP splits that of a residual MLP, which is the same."""
    model = config.model
    name = (
        "moe_ffn_hidden_size"
        if model.moe_ffn_hidden_size
        else "ffn_hidden_size"
        if model.ffn_hidden_size
        else "hidden_size"
    )
    width = expert_width(config)
    residual = model.mlp_type == "residual"
    ranks = config.parallel.tensor_model_parallel_size if residual else expert_tensor_size(config)
    if width % ranks:
        who, other = (
            ("a residual MLP", "--mlp-type standard")
            if residual
            else ("experts", "--expert-tensor-parallel-size 1")
        )
        rule = f"gives {who} a width of {width}, which must be divisible by the tensor-parallel size {ranks}"
        yield broken(
            config, name, rule, f"set --moe-ffn-hidden-size to a multiple of {ranks}, or use {other}"
        )


def dense_widths_by_tensor_parallel(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """TP splits the width of dense layers and of the shared expert."""
    if config.model.moe_shared_expert_intermediate_size is not None:
        yield from indivisible(config, "moe_shared_expert_intermediate_size", "tensor_model_parallel_size")
    if has_dense_layers(config):
        name = "ffn_hidden_size" if config.model.ffn_hidden_size else "hidden_size"
        yield from indivisible(config, name, "tensor_model_parallel_size", value=dense_width(config))


def sequence_parallel_needs_tensor_parallel(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Sequence parallelism spreads over the TP ranks."""
    if config.parallel.sequence_parallel and config.parallel.tensor_model_parallel_size == 1:
        yield broken(
            config,
            "sequence_parallel",
            "needs --tensor-model-parallel-size greater than 1",
            "leave out FLAG, or set --tensor-model-parallel-size",
        )


def sequence_by_ranks(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """CP gives each rank two slices, one from each end of the sequence; sequence parallelism splits these
    by TP.
    """
    parallel = config.parallel
    slices = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
    slices *= parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    if config.model.seq_length % slices:
        factors = ["2 x --context-parallel-size"] if parallel.context_parallel_size > 1 else []
        factors += ["--tensor-model-parallel-size"] if parallel.sequence_parallel else []
        rule = f"must be divisible by {' x '.join(factors)} = {slices}"
        yield broken(config, "seq_length", rule, f"use {multiples(config.model.seq_length, slices)}")


def layers_by_pipeline(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Every pipeline stage has a layer; megatron's stages, and interleaved chunks, have equally many."""
    if has_uneven_stages(config):
        return
    layers, stages = config.model.num_layers, config.parallel.pipeline_model_parallel_size
    chunks = stages * (config.parallel.virtual_pipeline_model_parallel_size or 1)
    if chunks > 1 and layers < chunks:
        yield broken(
            config,
            "num_layers",
            f"must be at least {chunks}: one layer for each (virtual) pipeline stage",
            f"use {chunks} or more layers",
        )
    elif layers % chunks and (config.engine.engine == "megatron" or chunks > stages):
        rule = f"must be divisible by pipeline x virtual pipeline stages = {chunks}"
        yield broken(config, "num_layers", rule, f"use {multiples(layers, chunks)}")


def named_stages_fit(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The stages between the first and the last share the other layers evenly; so do interleaved chunks."""
    if not has_uneven_stages(config):
        return
    parallel = config.parallel
    names = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    name = next(name for name in names if value_of(config, name) is not None)
    if parallel.pipeline_model_parallel_size == 1:
        remedy = "leave out FLAG, or set --pipeline-model-parallel-size"
        yield broken(config, name, "needs --pipeline-model-parallel-size greater than 1", remedy)
        return
    layers = config.model.num_layers
    try:
        sizes = stage_layers(config)
    except ValueError as error:
        rule = f"does not fit --num-layers = {layers}: {error}"
        yield broken(config, name, rule, "change FLAG or --num-layers")
        return
    first, last = (value_of(config, name) for name in names)
    between = {*sizes[1 if first else 0 : -1 if last else None]}
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    if len(between) > 1 or any(size % chunks for size in sizes):
        rule = f"gives the pipeline stages {', '.join(map(str, sizes))} layers"
        whole = (
            f"; each number must be divisible by the number of interleaved chunks ({chunks})"
            if chunks > 1
            else ""
        )
        equal = (
            "; all stages between the first and the last must have the same number of layers"
            if len(between) > 1
            else ""
        )
        yield broken(config, name, rule + whole + equal, "change FLAG or --num-layers")


def virtual_pipeline_needs_pipeline(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """There is nothing to interleave on one stage."""
    chunks = config.parallel.virtual_pipeline_model_parallel_size
    if chunks is not None and chunks > 1 and config.parallel.pipeline_model_parallel_size == 1:
        name = "virtual_pipeline_model_parallel_size"
        yield broken(
            config,
            name,
            "needs --pipeline-model-parallel-size greater than 1",
            "leave out FLAG, or set --pipeline-model-parallel-size",
        )


def divisors(number: int) -> str:
    """All divisors, for a remedy: ``1, 2 or 4``."""
    *firsts, last = [str(n) for n in range(1, number + 1) if number % n == 0]
    return f"{', '.join(firsts)} or {last}" if firsts else last


RULES: tuple[Rule, ...] = (
    world_by_layout,
    expert_tensor_parallel_is_all_or_none,
    data_ranks_by_experts,
    world_by_expert_layout,
    experts_by_expert_parallel,
    heads_by_tensor_parallel,
    vocabulary_by_tensor_parallel,
    expert_width_by_tensor_parallel,
    dense_widths_by_tensor_parallel,
    sequence_parallel_needs_tensor_parallel,
    sequence_by_ranks,
    layers_by_pipeline,
    named_stages_fit,
    virtual_pipeline_needs_pipeline,
)
