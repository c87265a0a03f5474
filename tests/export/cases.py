"""The table of models that go out: settings, and the class that computes the same."""

from __future__ import annotations

from typing import Any, NamedTuple

MEGATRON = {"engine": "megatron"}
UNTIED = {"untie_embeddings_and_output_weights": True}
BARE = {"qk_layernorm": False}
SIGMOID = {"name": "topk", "init_std": 0.2, "score_function": "sigmoid"}
DEEPSEEK_V3 = {**SIGMOID, "renormalise": True, "expert_bias": True}
TOPK = {"name": "topk", "init_std": 0.2}


class Case(NamedTuple):
    """A run, and what it becomes."""

    settings: dict[str, Any]
    architecture: str
    flags: str = ""  # of the export


QWEN2, QWEN3, MIXTRAL, GLM4, DEEPSEEK2, DEEPSEEK3, OWN = (
    f"{name}ForCausalLM"
    for name in (
        "Qwen2Moe",
        "Qwen3Moe",
        "Mixtral",
        "Glm4Moe",
        "DeepseekV2",
        "DeepseekV3",
        "HyperRouter",
    )
)
CASES: dict[str, Case] = {
    "hyper": Case(
        {"router": {"name": "hyper"}, "moe_router_topk": 4, "topk_schedule": "linear", "topk_start": 2}, QWEN3
    ),
    "hyper, wide heads, padded": Case(
        {"router": {"name": "hyper"}, "kv_channels": 24, "make_vocab_size_divisible_by": 640}, QWEN3
    ),
    "hyper, megatron": Case(
        {
            "router": {"name": "hyper"},
            **MEGATRON,
            "kv_channels": 24,
            "rotary_base": 50000,
            "norm_epsilon": 1e-6,
        },
        QWEN3,
    ),
    "smoe_dropout, megatron, untied, no groups": Case(
        {
            "router": {"name": "smoe_dropout", "init_std": 0.2},
            **MEGATRON,
            **UNTIED,
            "num_query_groups": 4,
            "rotary_base": 500000,
            "norm_epsilon": 1e-6,
        },
        QWEN3,
        "--max-shard-size 100KB",
    ),
    "topk": Case({"router": TOPK}, QWEN3),
    "switch": Case({"router": {**TOPK, "pre_softmax": True}}, QWEN3),
    "xmoe that folds": Case(
        {"router": {"name": "xmoe", "normalize_input": False, "renormalise": True}}, QWEN3
    ),
    "competesmoe": Case({"router": {"name": "competesmoe"}}, QWEN3),
    "simsmoe, megatron": Case({"router": {"name": "simsmoe"}, **MEGATRON}, QWEN3),
    "hyper, megatron, no q/k norms": Case(
        {"router": {"name": "hyper"}, **MEGATRON, **UNTIED, **BARE}, MIXTRAL, "--max-shard-size 100KB"
    ),
    "deepseek-v3's router": Case({"router": DEEPSEEK_V3}, GLM4),
    "the same without q/k norms": Case({"router": DEEPSEEK_V3, **BARE}, GLM4),
    "sigmoids as they are": Case({"router": SIGMOID}, GLM4),
    "hyper with a bias": Case({"router": {"name": "hyper", "bias": True}}, OWN, "--custom-code"),
    "xmoe": Case({"router": {"name": "xmoe"}}, OWN, "--custom-code"),
    "stablemoe, second stage": Case({"router": {"name": "stablemoe", "init_std": 0.2}}, OWN, "--custom-code"),
    "switch without q/k norms": Case({"router": {**TOPK, "pre_softmax": True}, **BARE}, OWN, "--custom-code"),
    "stablemoe, first stage": Case(
        {"router": {"name": "stablemoe", "init_std": 0.2, "stage1_share": 1.0}}, OWN, "--custom-code"
    ),
    "softmax with a choice bias": Case({"router": {**TOPK, "expert_bias": True}}, OWN, "--custom-code"),
}
SHARED = {"moe_shared_expert_intermediate_size": 24}
DENSE = {"moe_layer_freq": "[0,1]", "ffn_hidden_size": 40}
LATENT = {
    "multi_latent_attention": True,
    "num_query_groups": None,
    "norm_epsilon": 1e-6,
    "kv_lora_rank": 12,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 6,
    "v_head_dim": 10,
    "moe_ffn_hidden_size": 24,
    **DENSE,
    "moe_shared_expert_intermediate_size": 48,
}
YARN = {
    "rotary_scaling_factor": 8.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
IN_GROUPS = {"num_groups": 4, "group_topk": 2, "scaling_factor": 2.5}
HYPER = {"name": "hyper"}
CASES |= {
    "hyper, a dense layer": Case({"router": HYPER, **MEGATRON, **DENSE}, QWEN3),
    "hyper, YaRN": Case({"router": HYPER, "rope_type": "yarn", **YARN}, QWEN3),
    "hyper, a window": Case({"router": HYPER, **BARE, "window_size": "7,0"}, MIXTRAL),
    "hyper, calibrated for k = 1, a shared expert": Case(
        {"router": HYPER, **BARE, **SHARED, **DENSE, "moe_router_topk": 4},
        QWEN2,
        "--topk 1 --calibrate-k",
    ),
    "hyper, a gated shared expert, biases": Case(
        {"router": HYPER, **BARE, **SHARED, **DENSE, "moe_shared_expert_gate": True, "add_qkv_bias": True},
        QWEN2,
    ),
    "switch, a shared expert, megatron": Case(
        {"router": {**TOPK, "pre_softmax": True}, **BARE, **SHARED, **MEGATRON, **UNTIED}, QWEN2
    ),
    "deepseek-v3's router, shared experts, half of the channels turn": Case(
        {"router": DEEPSEEK_V3, **SHARED, **DENSE, "rotary_percent": 0.5, "moe_ffn_hidden_size": 12}, GLM4
    ),
    "hyper, q/k norms, a shared expert": Case({"router": HYPER, **SHARED, **UNTIED}, OWN, "--custom-code"),
    "xmoe, a dense layer, a gated shared expert": Case(
        {"router": {"name": "xmoe"}, **SHARED, **DENSE, "moe_shared_expert_gate": True}, OWN, "--custom-code"
    ),
    "deepseek-v2-lite": Case(
        {"router": {**TOPK, "pre_softmax": True, "scaling_factor": 1.5}, **LATENT, "rope_type": "rope"},
        DEEPSEEK2,
        "--max-shard-size 100KB",
    ),
    "deepseek-v2's router out of hyper, megatron": Case(
        {"router": {**HYPER, "pre_softmax": True}, **LATENT, **YARN, **MEGATRON, "q_lora_rank": 14},
        DEEPSEEK2,
    ),
    "deepseek-v3, groups": Case(
        {
            "router": {**DEEPSEEK_V3, **IN_GROUPS},
            **LATENT,
            **YARN,
            "q_lora_rank": 14,
            "moe_router_topk": 4,
        },
        DEEPSEEK3,
    ),
    "deepseek-v3's router out of hyper, megatron": Case(
        {
            "router": {**HYPER, "score_function": "sigmoid", "renormalise": True, "expert_bias": True},
            **LATENT,
            **UNTIED,
            **MEGATRON,
            "rope_type": "rope",
        },
        DEEPSEEK3,
    ),
}
WITHOUT_NORMS = {"qk_layernorm": False, "norm_epsilon": 1e-5, "moe_shared_expert_intermediate_size": None}
CASES |= {  # latent attention with a router that DeepSeek's classes do not have
    "hyper, latent attention": Case({"router": HYPER, **LATENT, "norm_epsilon": 1e-5}, OWN, "--custom-code"),
    "hyper, latent attention without norms, low rank, YaRN": Case(
        {"router": HYPER, **LATENT, **WITHOUT_NORMS, **YARN, **UNTIED, "q_lora_rank": 14},
        OWN,
        "--custom-code",
    ),
    "xmoe, latent attention, megatron": Case(
        {"router": {"name": "xmoe"}, **LATENT, **MEGATRON, "moe_layer_freq": "[1,0]", "q_lora_rank": 14},
        OWN,
        "--custom-code",
    ),
}
SWITCH_IN_GROUPS = {**TOPK, "pre_softmax": True, **IN_GROUPS}
CASES |= {  # groups and a factor, which no class has beside these weights or scores
    "hyper, groups, a factor": Case({"router": {**HYPER, **IN_GROUPS}}, OWN, "--custom-code"),
    "switch, groups, a factor, latent attention, megatron": Case(
        {"router": {**SWITCH_IN_GROUPS, "renormalise": True}, **LATENT, **MEGATRON}, OWN, "--custom-code"
    ),
    "switch, groups, a factor": Case({"router": SWITCH_IN_GROUPS}, OWN, "--custom-code"),
    "sigmoids, a choice bias, groups at every k": Case(
        {"router": {**DEEPSEEK_V3, **IN_GROUPS}}, OWN, "--custom-code"
    ),
    "xmoe, groups, a factor": Case(
        {"router": {"name": "xmoe", **IN_GROUPS, "renormalise": True}}, OWN, "--custom-code"
    ),
    "stablemoe, groups, a factor": Case(
        {"router": {"name": "stablemoe", "init_std": 0.2, **IN_GROUPS}}, OWN, "--custom-code"
    ),
}
REFUSED: dict[str, Case] = {
    "no class supports a bias on the router logits": Case({"router": {"name": "hyper", "bias": True}}, ""),
    "router xmoe normalizes each token": Case({"router": {"name": "xmoe"}}, ""),
    "cannot be folded": Case({"router": {"name": "stablemoe"}}, ""),
    "sum to 1, unlike those of this router": Case({"router": {**TOPK, "pre_softmax": True}, **BARE}, ""),
    "no class supports --router.expert-bias with softmax scores": Case(
        {"router": {**TOPK, "expert_bias": True}}, ""
    ),
    "Qwen3-MoE does not support --moe-shared-expert-intermediate-size": Case({"router": HYPER, **SHARED}, ""),
    "needs latent norms with epsilon 1e-06, not 1e-05": Case(
        {"router": HYPER, **LATENT, "norm_epsilon": 1e-5}, ""
    ),
    "DeepSeek-V2 needs expert weights that do not sum to 1": Case({"router": HYPER, **LATENT}, ""),
    "DeepSeek-V3 supports dense layers only before the MoE layers": Case(
        {"router": DEEPSEEK_V3, **LATENT, "moe_layer_freq": "[1,0]"}, ""
    ),
    "DeepSeek-V3 scores a group of experts by its 2 best experts": Case(
        {"router": {**DEEPSEEK_V3, **IN_GROUPS}, **LATENT}, ""
    ),
    "--mlp-type residual": Case({"router": TOPK, "mlp_type": "residual"}, ""),
}
