"""Bytes that a rank keeps from the forward to the backward pass, and the working memory of one layer.

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
    recomputed_parts,
)
from megatron_hyperrouter.model.output import chunk_tokens

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.planning.held.stages import StageContent
    from megatron_hyperrouter.planning.layouts import Candidate

_FLOAT32 = 4


class LayerActivations(NamedTuple):
    """Bytes of a micro-batch in one layer."""

    kept: float  # until the backward pass
    working: float  # more, while the backward pass is in it


def layer_of(candidate: Candidate, skew: float, with_experts: bool) -> LayerActivations:
    """A layer of the layout of ``candidate``; ``skew``: load of the busiest rank of experts over the mean."""
    config = candidate.config
    size = 2 if config.train.bf16 else 4
    tensor, D = config.parallel.tensor_model_parallel_size, config.model.hidden_size
    T = config.train.micro_batch_size * config.model.seq_length / config.parallel.context_parallel_size
    own = T / tensor
    attention = own * (size * (5 * D + _heads(config)) + _FLOAT32 * (4 * D + _normed(config)))
    mlp, working = (_routed if with_experts else _dense)(config, own, skew)
    if config.engine.engine == "deepspeed" and tensor > 1 and with_experts:
        mlp += (T - own) * D * (size + _FLOAT32)  # every rank routes all tokens
    shared = _shared(config, T) if with_experts else 0.0
    parts = recomputed_parts(config)
    if ("moe" if with_experts else "mlp") in parts:  # its input is kept, and the rest computed again
        mlp, working, shared = size * own * D, working + mlp + shared, 0.0
    elif "shared_experts" in parts:
        working, shared = working + shared, 0.0
    mlp += shared
    if config.train.recompute_granularity == "full":
        return LayerActivations(size * own * D, attention + mlp + working)
    return LayerActivations(attention + mlp, working)


def _routed(config: RunConfig, own: float, skew: float) -> tuple[float, float]:
    """Kept and working bytes of a mixture of experts, for ``own`` tokens of this rank."""
    model, shares, D = config.model, expert_tensor_size(config), config.model.hidden_size
    size = 2 if config.train.bf16 else 4
    F = expert_width(config) / shares
    rows = own * model.moe_router_topk * shares
    if config.parallel.expert_model_parallel_size * shares > 1:
        rows *= skew
    router = own * _FLOAT32 * (D * config.train.bf16 + 5 * model.num_experts)
    kept = size * rows * (D + 2 * F)
    return kept + router, size * rows * (2 * D + 4 * F)


def _shared(config: RunConfig, tokens: float) -> float:
    """Kept bytes of the shared expert, which every tensor-parallel rank computes for all ``tokens``."""
    width = config.model.moe_shared_expert_intermediate_size
    if width is None:
        return 0.0
    size, tensor = 2 if config.train.bf16 else 4, config.parallel.tensor_model_parallel_size
    return size * tokens * (3 * width / tensor + config.model.hidden_size)


def _dense(config: RunConfig, own: float, skew: float) -> tuple[float, float]:
    """Like :func:`_routed`, for a dense layer; tensor parallelism splits its width."""
    size = 2 if config.train.bf16 else 4
    return size * own * 3 * dense_width(config), size * own * 3 * dense_width(config)


def _heads(config: RunConfig) -> float:
    """Channels of queries, keys, values and outputs of attention that a token keeps."""
    model, latent = config.model, config.attention
    heads = model.num_attention_heads
    if latent.multi_latent_attention:
        query = heads * (latent.qk_head_dim + latent.qk_pos_emb_head_dim)
        return 2 * (2 * query + heads * latent.v_head_dim) + latent.kv_lora_rank
    return head_width(config) * (3 * heads + 3 * query_groups(config))


def _normed(config: RunConfig) -> float:
    """Channels of queries and keys that norms keep."""
    if not config.model.qk_layernorm or config.attention.multi_latent_attention:
        return 0.0
    return head_width(config) * (config.model.num_attention_heads + query_groups(config))


def activations_of(
    candidate: Candidate,
    stages: list[StageContent],
    number: int,
    layers: list[LayerActivations],
    routed: tuple[bool, ...],
) -> LayerActivations:
    """Of all micro-batches that a stage has in flight; ``layers``: without and with experts."""
    stage = stages[number]
    kept = sum(layers[routed[layer]].kept for layer in stage.layers)
    working = max((layers[routed[layer]].working for layer in stage.layers), default=0.0)
    return LayerActivations(kept * _in_flight(candidate, len(stages), number), working)


def _in_flight(candidate: Candidate, stages: int, number: int) -> float:
    """Largest number of micro-batches whose activations a stage keeps."""
    chunks = candidate.config.parallel.virtual_pipeline_model_parallel_size or 1
    if stages == 1:
        return 1.0
    if chunks == 1:
        return float(min(stages - number, candidate.micro_batches))
    passes = stages * (chunks - 1) + 2 * (stages - 1 - number) + 1
    return min(passes, candidate.micro_batches * chunks) / chunks


def logits_of(candidate: Candidate, rows: int) -> float:
    """Of the chunk of tokens that the loss has in hand, and the gradient of the output matrix; ``rows``: 0 if
    the size of the vocabulary is not known.
    """
    if not rows:
        return 0.0
    config = candidate.config
    size = 2 if config.train.bf16 else 4
    T = config.train.micro_batch_size * config.model.seq_length // config.parallel.context_parallel_size
    V, D = rows // config.parallel.tensor_model_parallel_size, config.model.hidden_size
    chunk = min(chunk_tokens(V), T)
    if chunk < T and config.train.bf16:  # the gradient is added up in float32, a chunk at a time
        logits = chunk * V * (_FLOAT32 + size) + V * D * _FLOAT32
        added = chunk * V * size + V * D * (_FLOAT32 + size)
        return float(max(logits, added) + 2 * T * D * size)
    if chunk < T:
        return float(chunk * V * _FLOAT32 + 2 * V * D * _FLOAT32 + 2 * T * D * size)
    if config.train.bf16:
        return float(chunk * V * (_FLOAT32 + size) + 2 * T * D * size)
    return float(chunk * V * _FLOAT32 + V * D * size + 2 * T * D * size)
