"""Rules about 8-bit floating-point numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from megatron_hyperrouter.config.derived import (
    dense_width,
    expert_tensor_size,
    expert_width,
    has_dense_layers,
    head_width,
    query_groups,
    resets_documents,
)
from megatron_hyperrouter.config.leaves import flag
from megatron_hyperrouter.config.rules.base import Rule, broken, multiples, needs
from megatron_hyperrouter.config.sections.precision import PrecisionConfig
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import Problem


def fp8_settings_need_fp8(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Scales and layers in bfloat16 mean nothing if nothing is computed in fp8."""
    if config.precision.fp8_format is not None:
        return
    default = PrecisionConfig()
    for each in fields(PrecisionConfig):
        if getattr(config.precision, each.name) != getattr(default, each.name):
            yield needs(config, each.name, "--fp8-format")


def fp8_needs_bf16_and_its_layers(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Transformer Engine's fp8 products have bfloat16 inputs and outputs; PyTorch's layers do not support
    fp8.
    """
    if config.precision.fp8_format is None:
        return
    if not config.train.bf16:
        yield needs(config, "fp8_format", "--bf16")
    if config.engine.transformer_impl == "local":
        remedy = "use --transformer-impl transformer_engine, or leave out --fp8-format"
        yield broken(config, "fp8_format", "cannot be combined with --transformer-impl local", remedy)
    if resets_documents(config):  # only PyTorch's layers support this
        rule = "cannot be combined with --reset-attention-mask or --reset-position-ids"
        yield broken(config, "fp8_format", rule, "leave out those two flags, or --fp8-format")


def fp8_layers_in_bf16_have_their_own_scales(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """megatron-core refuses the pair (fp8_utils.py:650): histories are reduced once for all layers."""
    precision = config.precision
    delayed = precision.fp8_format is not None and precision.fp8_recipe == "delayed"
    if delayed and precision.first_last_layers_bf16:
        rule = "cannot be combined with --fp8-recipe delayed"
        yield broken(config, "first_last_layers_bf16", rule, "use --fp8-recipe tensorwise, or leave out FLAG")


def fp8_widths(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Rows of fp8 matrices come in blocks of 16 numbers, in mxfp8 of 32, on each rank."""
    precision, model = config.precision, config.model
    if precision.fp8_format is None:
        return
    block = 32 if precision.fp8_recipe == "mxfp8" else 16
    widths = {
        "hidden_size": (model.hidden_size, 1),
        "moe_ffn_hidden_size": (expert_width(config), expert_tensor_size(config)),
    }
    if has_dense_layers(config):
        widths["ffn_hidden_size"] = (dense_width(config), config.parallel.tensor_model_parallel_size)
    for name, (width, parts) in widths.items():
        if width % (block * parts):
            rule = f"must be divisible by {block * parts} for --fp8-format with --fp8-recipe "
            remedy = f"use {multiples(width, block * parts)}, or leave out --fp8-format"
            yield Problem(flag(name), width, rule + precision.fp8_recipe, remedy)
    if not config.attention.multi_latent_attention:
        yield from _projections(config, block)


def _projections(config: RunConfig, block: int) -> Iterator[Problem]:
    heads, channels = config.model.num_attention_heads, head_width(config)
    whole = block * config.parallel.tensor_model_parallel_size
    for width in (heads * channels, (heads + 2 * query_groups(config)) * channels):
        if width % whole:
            rule = (
                f"gives an attention projection a width of {width}; --fp8-format needs a multiple of {whole}"
            )
            remedy = f"use {multiples(channels, block)}, or leave out --fp8-format"
            yield Problem(flag("kv_channels"), channels, rule, remedy)
            return


RULES: tuple[Rule, ...] = (
    fp8_settings_need_fp8,
    fp8_needs_bf16_and_its_layers,
    fp8_layers_in_bf16_have_their_own_scales,
    fp8_widths,
)
