"""The tensors of a model that nobody has built yet, from its settings alone."""

from __future__ import annotations

from megatron_hyperrouter.analysis.size import OUTPUT, router_on_meta
from megatron_hyperrouter.config.derived import (
    dense_width,
    expert_width,
    head_width,
    moe_layers,
    query_groups,
)
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.model.names import WORD_EMBEDDINGS

Shapes = dict[str, tuple[int, ...]]


def shapes_of(config: RunConfig, rows: int) -> Shapes:
    """Global name -> shape of each trained tensor; ``rows``: of the embedding."""
    model, width = config.model, config.model.hidden_size
    found: Shapes = {WORD_EMBEDDINGS: (rows, width), "decoder.final_layernorm.weight": (width,)}
    if model.untie_embeddings_and_output_weights:
        found[OUTPUT] = (rows, width)
    router = {
        name: tuple(parameter.shape)
        for name, parameter in router_on_meta(config).named_parameters()
        if parameter.requires_grad
    }
    for layer, has_experts in enumerate(moe_layers(config)):
        prefix = f"decoder.layers.{layer}."
        found |= _attention(config, prefix)
        if has_experts:
            found |= {f"{prefix}mlp.router.{name}": shape for name, shape in router.items()}
            found |= _experts(config, f"{prefix}mlp.")
        else:
            found |= _mlp(f"{prefix}mlp.", width, dense_width(config))
    return found


def _attention(config: RunConfig, prefix: str) -> Shapes:
    model, channels = config.model, head_width(config)
    width, heads = model.hidden_size, model.num_attention_heads
    found: Shapes = {f"{prefix}{name}_layernorm.weight": (width,) for name in ("input", "pre_mlp")}
    found[f"{prefix}self_attention.linear_qkv.weight"] = (
        (heads + 2 * query_groups(config)) * channels,
        width,
    )
    found[f"{prefix}self_attention.linear_proj.weight"] = (width, heads * channels)
    if model.qk_layernorm:
        found |= {f"{prefix}self_attention.{each}_layernorm.weight": (channels,) for each in "qk"}
    return found


def _experts(config: RunConfig, prefix: str) -> Shapes:
    model, width = config.model, config.model.hidden_size
    found: Shapes = {}
    for expert in range(model.num_experts):
        found |= _mlp(f"{prefix}experts.local_experts.{expert}.", width, expert_width(config))
    if shared := model.moe_shared_expert_intermediate_size:
        found |= _mlp(f"{prefix}shared_experts.", width, shared)
        if model.moe_shared_expert_gate:
            found[f"{prefix}shared_experts.gate_weight"] = (1, width)
    if model.mlp_type == "residual":
        found |= _mlp(f"{prefix}residual.", width, expert_width(config))
        found |= {f"{prefix}coefficient.weight": (2, width), f"{prefix}coefficient.bias": (2,)}
    return found


def _mlp(prefix: str, width: int, hidden: int) -> Shapes:
    return {f"{prefix}linear_fc1.weight": (2 * hidden, width), f"{prefix}linear_fc2.weight": (width, hidden)}
