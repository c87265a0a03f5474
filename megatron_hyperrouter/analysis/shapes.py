"""The shape of every trained weight of a run, by global name, from its settings alone.

Legend: ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_hyperrouter.analysis.size import OUTPUT, router_on_meta
from megatron_hyperrouter.config.derived import (
    dense_width,
    expert_width,
    head_width,
    moe_layers,
    query_groups,
)
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.model.names import WORD_EMBEDDINGS, router_prefix

Shape = tuple[int, ...]


def shapes_of(config: RunConfig, rows: int, vocab_size: int = 1) -> dict[str, Shape]:
    """Global name -> shape of each trained tensor; ``rows``: of the embedding; ``vocab_size``: number of
    token ids, needed only for a router that uses them.
    """
    model, D = config.model, config.model.hidden_size
    found: dict[str, Shape] = {WORD_EMBEDDINGS: (rows, D), "decoder.final_layernorm.weight": (D,)}
    if model.untie_embeddings_and_output_weights:
        found[OUTPUT] = (rows, D)
    router = {
        name: tuple(parameter.shape)
        for name, parameter in router_on_meta(config, vocab_size).named_parameters()
        if parameter.requires_grad
    }
    routed = moe_layers(config)
    for layer, with_experts in enumerate(routed):
        found |= _layer(config, f"decoder.layers.{layer}.", with_experts)
        if with_experts:
            found |= _in(router_prefix(layer + 1, model.num_layers), router)
    for number in range(model.mtp_num_layers or 0):  # each is built as the last layer is
        prefix = f"mtp.layers.{number}."
        norms = {f"{prefix}{name}.weight": (D,) for name in ("enorm", "hnorm", "final_layernorm")}
        found |= norms | {f"{prefix}eh_proj.weight": (D, 2 * D)}
        found |= _layer(config, f"{prefix}transformer_layer.", routed[-1])
        if routed[-1]:
            found |= _in(router_prefix(model.num_layers + number + 1, model.num_layers), router)
    return found


def _layer(config: RunConfig, prefix: str, with_experts: bool) -> dict[str, Shape]:
    D = config.model.hidden_size
    found: dict[str, Shape] = {f"{name}_layernorm.weight": (D,) for name in ("input", "pre_mlp")}
    attention = _latent if config.attention.multi_latent_attention else _grouped
    found |= _in("self_attention.", dict(attention(config)))
    found |= _in("mlp.", dict(_experts(config) if with_experts else _mlp(D, dense_width(config))))
    return _in(prefix, found)


def _in(prefix: str, shapes: dict[str, Shape]) -> dict[str, Shape]:
    return {prefix + name: shape for name, shape in shapes.items()}


def _grouped(config: RunConfig) -> Iterator[tuple[str, Shape]]:
    D, heads, width = config.model.hidden_size, config.model.num_attention_heads, head_width(config)
    rows = (heads + 2 * query_groups(config)) * width
    yield "linear_qkv.weight", (rows, D)
    if config.attention.add_qkv_bias:
        yield "linear_qkv.bias", (rows,)
    yield "linear_proj.weight", (D, heads * width)
    if config.model.qk_layernorm:
        yield "q_layernorm.weight", (width,)
        yield "k_layernorm.weight", (width,)


def _latent(config: RunConfig) -> Iterator[tuple[str, Shape]]:
    D, heads, sizes = config.model.hidden_size, config.model.num_attention_heads, config.attention
    query = heads * (sizes.qk_head_dim + sizes.qk_pos_emb_head_dim)
    rank = sizes.kv_lora_rank
    if sizes.q_lora_rank is None:
        yield "linear_q_proj.weight", (query, D)
    else:
        yield "linear_q_down_proj.weight", (sizes.q_lora_rank, D)
        yield "linear_q_up_proj.weight", (query, sizes.q_lora_rank)
        if config.model.qk_layernorm:
            yield "q_layernorm.weight", (sizes.q_lora_rank,)
    yield "linear_kv_down_proj.weight", (rank + sizes.qk_pos_emb_head_dim, D)
    yield "linear_kv_up_proj.weight", (heads * (sizes.qk_head_dim + sizes.v_head_dim), rank)
    if config.model.qk_layernorm:
        yield "kv_layernorm.weight", (rank,)
    yield "linear_proj.weight", (D, heads * sizes.v_head_dim)


def _experts(config: RunConfig) -> Iterator[tuple[str, Shape]]:
    model, D = config.model, config.model.hidden_size
    for expert in range(model.num_experts):
        for name, shape in _mlp(D, expert_width(config)):
            yield f"experts.local_experts.{expert}.{name}", shape
    if model.moe_shared_expert_intermediate_size is not None:
        for name, shape in _mlp(D, model.moe_shared_expert_intermediate_size):
            yield f"shared_experts.{name}", shape
        if model.moe_shared_expert_gate:
            yield "shared_experts.gate_weight", (1, D)
    if model.mlp_type == "residual":
        for name, shape in _mlp(D, expert_width(config)):
            yield f"residual.{name}", shape
        yield "coefficient.weight", (2, D)
        yield "coefficient.bias", (2,)


def _mlp(D: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield "linear_fc1.weight", (2 * width, D)
    yield "linear_fc2.weight", (D, width)
