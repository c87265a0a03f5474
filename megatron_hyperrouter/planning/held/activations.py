"""Bytes that a rank keeps from the forward to the backward pass, and those of the layer in hand.

Legend: ``T`` tokens of a micro-batch on a rank, ``D`` hidden size, ``V`` rows of the embedding on a rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from megatron_hyperrouter.config.derived import (
    dense_width,
    expert_tensor_size,
    expert_width,
    head_width,
    query_groups,
)
from megatron_hyperrouter.model.output import chunk_tokens

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.planning.held.stages import Stage
    from megatron_hyperrouter.planning.layouts import Candidate

_FLOAT32 = 4


class Layer(NamedTuple):
    """Bytes of a micro-batch in one layer."""

    kept: float  # until the backward pass
    working: float  # while the layer is computed


def layer_of(candidate: Candidate, skew: float, with_experts: bool) -> Layer:
    """A layer of the layout of ``candidate``; ``skew``: load of the busiest rank of experts over the mean."""
    config = candidate.config
    size = 2 if config.train.bf16 else 4
    parallel, model, D = config.parallel, config.model, config.model.hidden_size
    tensor = parallel.tensor_model_parallel_size
    T = config.train.micro_batch_size * model.seq_length / parallel.context_parallel_size
    attention = T / tensor * (6 * D + _heads(config))
    if with_experts:
        shares = expert_tensor_size(config)
        routes = T / tensor * model.moe_router_topk * shares
        rows = routes * skew if parallel.expert_model_parallel_size > 1 else routes
        mlp = rows * (D + 2 * expert_width(config) / shares) + routes * D + T / tensor * 2 * D
        if model.moe_shared_expert_intermediate_size:
            mlp += T / tensor * (3 * model.moe_shared_expert_intermediate_size + D)
        working = rows * (3 * D + 4 * expert_width(config) / shares)
    else:
        mlp = T / tensor * (3 * dense_width(config) + D)
        working = T / tensor * 4 * dense_width(config)
    kept, selective = attention + mlp, config.train.recompute_granularity
    if selective == "full":
        return Layer(size * T / tensor * D, size * (attention + mlp + working))
    return Layer(size * kept, size * working)


def _heads(config: RunConfig) -> float:
    """Channels of queries, keys, values and outputs of attention that a token keeps."""
    model, latent = config.model, config.attention
    heads = model.num_attention_heads
    if latent.multi_latent_attention:
        query = heads * (latent.qk_head_dim + latent.qk_pos_emb_head_dim)
        return 2 * (2 * query + heads * latent.v_head_dim) + latent.kv_lora_rank
    width = head_width(config)
    qkv = (heads + 2 * query_groups(config)) * width
    return 2 * qkv + heads * width


def activations_of(
    candidate: Candidate,
    stages: list[Stage],
    number: int,
    layers: list[Layer],
    routed: tuple[bool, ...],
) -> float:
    """Of all micro-batches that a stage has in flight; ``layers``: without and with experts."""
    stage = stages[number]
    kept = sum(layers[routed[layer]].kept for layer in stage.layers)
    working = max((layers[routed[layer]].working for layer in stage.layers), default=0.0)
    return kept * _in_flight(candidate, len(stages), number) + working


def _in_flight(candidate: Candidate, stages: int, number: int) -> float:
    """Micro-batches whose activations a stage holds at most."""
    chunks = candidate.config.parallel.virtual_pipeline_model_parallel_size or 1
    if stages == 1:
        return 1.0
    if chunks == 1:
        return float(min(stages - number, candidate.micro_batches))
    passes = stages * (chunks - 1) + 2 * (stages - 1 - number) + 1
    return min(passes, candidate.micro_batches * chunks) / chunks


def logits_of(candidate: Candidate, rows: int) -> float:
    """Of the chunk of tokens that the loss has in hand, and the gradient of the output matrix."""
    config = candidate.config
    size = 2 if config.train.bf16 else 4
    T = config.train.micro_batch_size * config.model.seq_length // config.parallel.context_parallel_size
    V = rows // config.parallel.tensor_model_parallel_size
    chunk = min(chunk_tokens(V), T)
    D = config.model.hidden_size
    gradient = V * D * (size if chunk >= T else size + _FLOAT32)
    return float(chunk * V * (size + _FLOAT32) + gradient + 2 * T * D * size)
