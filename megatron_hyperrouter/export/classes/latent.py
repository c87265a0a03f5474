"""Classes of transformers with latent attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.export.classes.family import (
    DENSE_LAYERS,
    SHARED_EXPERTS,
    Family,
    deepseek_fields,
    dense_layers_first,
    sigmoid_scores,
    softmax_scores,
    whole_shared_experts,
)
from megatron_hyperrouter.export.classes.names import QWEN

EPSILON = 1e-6  # of the norms of latent vectors: a constant in transformers
LATENT_ATTENTION = (
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
)
_SETTINGS = (*DENSE_LAYERS, *SHARED_EXPERTS, "moe_shared_expert_gate", *LATENT_ATTENTION)


def _latent_lacks(run: RunConfig) -> Iterator[str]:
    if not run.attention.multi_latent_attention:
        yield "needs latent attention (--multi-latent-attention)"
    elif not run.model.qk_layernorm:
        yield "needs latent norms (--qk-layernorm)"
    elif run.model.norm_epsilon != EPSILON:
        yield (
            f"needs latent norms with epsilon {EPSILON:g}, not {run.model.norm_epsilon:g} (--norm-epsilon)"
        )
    yield from dense_layers_first(run)
    yield from whole_shared_experts(run)


def _deepseek_v2_lacks(run: RunConfig, options: Any) -> Iterator[str]:
    yield from _latent_lacks(run)
    yield from softmax_scores(options)
    if options.sums_to_one:
        yield "needs expert weights that do not sum to 1 (--router.pre-softmax)"


def _deepseek_v3_lacks(run: RunConfig, options: Any) -> Iterator[str]:
    yield from _latent_lacks(run)
    yield from sigmoid_scores(options)


def attention_fields(run: RunConfig) -> dict[str, Any]:
    """What the classes with latent attention call its sizes."""
    attention = run.attention
    return {
        "num_key_value_heads": run.model.num_attention_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_head_dim,
        "qk_rope_head_dim": attention.qk_pos_emb_head_dim,
        "v_head_dim": attention.v_head_dim,
        "rope_interleave": True,
        "head_dim": attention.qk_pos_emb_head_dim,
    }


def _latent_fields(run: RunConfig, options: Any) -> dict[str, Any]:
    return deepseek_fields(run, options) | attention_fields(run)


def _deepseek_v2_fields(run: RunConfig, options: Any) -> dict[str, Any]:
    method = "greedy" if options.groups is None else "group_limited_greedy"
    return _latent_fields(run, options) | {"topk_method": method, "scoring_func": "softmax"}


def _deepseek_v3_fields(run: RunConfig, options: Any) -> dict[str, Any]:
    named = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    return _latent_fields(run, options) | named


DEEPSEEK_V2 = Family(
    "DeepSeek-V2",
    "DeepseekV2ForCausalLM",
    "deepseek_v2",
    QWEN,
    _SETTINGS,
    _deepseek_v2_lacks,
    _deepseek_v2_fields,
    group_best=1,
)
DEEPSEEK_V3 = Family(
    "DeepSeek-V3",
    "DeepseekV3ForCausalLM",
    "deepseek_v3",
    QWEN,
    _SETTINGS,
    _deepseek_v3_lacks,
    _deepseek_v3_fields,
    choice_bias=True,
    group_best=2,
)
