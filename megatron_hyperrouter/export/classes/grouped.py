"""Classes of transformers with grouped-query attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_hyperrouter.config.derived import expert_width, head_width, moe_layers, windows
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
from megatron_hyperrouter.export.classes.names import MIXTRAL, QWEN, QWEN2


def _plain_softmax(options: Any) -> Iterator[str]:
    yield from softmax_scores(options)
    if options.scaling_factor != 1.0:
        yield "does not support --router.scaling-factor"


def _qwen3_lacks(run: RunConfig, options: Any) -> Iterator[str]:
    yield from _plain_softmax(options)
    if not run.model.qk_layernorm:
        yield "needs q/k norms (--qk-layernorm)"


def _qwen3_fields(run: RunConfig, options: Any) -> dict[str, Any]:
    return {
        "num_experts": run.model.num_experts,
        "moe_intermediate_size": expert_width(run),
        "norm_topk_prob": options.sums_to_one,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [number for number, routed in enumerate(moe_layers(run)) if not routed],
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _qwen2_lacks(run: RunConfig, options: Any) -> Iterator[str]:
    yield from _plain_softmax(options)
    model = run.model
    if model.qk_layernorm:
        yield "does not support q/k norms (--qk-layernorm)"
    if model.moe_shared_expert_intermediate_size is None:
        yield "needs a shared expert (--moe-shared-expert-intermediate-size)"
    if head_width(run) * model.num_attention_heads != model.hidden_size:
        yield "needs a head width equal to hidden size / number of heads (--kv-channels)"


def _qwen2_fields(run: RunConfig, options: Any) -> dict[str, Any]:
    return _qwen3_fields(run, options) | {
        "shared_expert_intermediate_size": run.model.moe_shared_expert_intermediate_size,
        "qkv_bias": run.attention.add_qkv_bias,
    }


def _mixtral_lacks(run: RunConfig, options: Any) -> Iterator[str]:
    yield from _plain_softmax(options)
    if not options.sums_to_one:
        yield "needs expert weights that sum to 1, unlike those of this router"
    if run.model.qk_layernorm:
        yield "does not support q/k norms (--qk-layernorm)"
    if len(set(windows(run))) > 1:
        yield "needs the sliding window in all layers (--window-attn-skip-freq)"


def _mixtral_fields(run: RunConfig, _options: Any) -> dict[str, Any]:
    window = windows(run)[0]  # ours counts the tokens before, theirs the token itself as well
    return {
        "num_local_experts": run.model.num_experts,
        "intermediate_size": expert_width(run),
        "sliding_window": None if window is None else window + 1,
    }


def _glm4_lacks(run: RunConfig, options: Any) -> Iterator[str]:
    yield from sigmoid_scores(options)
    yield from dense_layers_first(run)
    yield from whole_shared_experts(run)


def _glm4_fields(run: RunConfig, options: Any) -> dict[str, Any]:
    """Without shared experts the class has one without rows."""
    share = run.attention.rotary_percent
    return {
        **deepseek_fields(run, options),
        "use_qk_norm": run.model.qk_layernorm,
        "attention_bias": run.attention.add_qkv_bias,
        "partial_rotary_factor": share,
        "rope_parameters": {"partial_rotary_factor": share},
    }


QWEN3_MOE = Family(
    "Qwen3-MoE", "Qwen3MoeForCausalLM", "qwen3_moe", QWEN, DENSE_LAYERS, _qwen3_lacks, _qwen3_fields
)
MIXTRAL_MOE = Family(
    "Mixtral",
    "MixtralForCausalLM",
    "mixtral",
    MIXTRAL,
    ("window_size", "window_attn_skip_freq"),
    _mixtral_lacks,
    _mixtral_fields,
)
QWEN2_MOE = Family(
    "Qwen2-MoE",
    "Qwen2MoeForCausalLM",
    "qwen2_moe",
    QWEN2,
    (*DENSE_LAYERS, *SHARED_EXPERTS, "moe_shared_expert_gate", "add_qkv_bias"),
    _qwen2_lacks,
    _qwen2_fields,
)
GLM4_MOE = Family(
    "GLM-4-MoE",
    "Glm4MoeForCausalLM",
    "glm4_moe",
    QWEN,
    (*DENSE_LAYERS, *SHARED_EXPERTS, "moe_shared_expert_gate", "add_qkv_bias", "rotary_percent"),
    _glm4_lacks,
    _glm4_fields,
    choice_bias=True,
    group_best=2,
)
