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


QWEN3, MIXTRAL, GLM4, OWN = (
    f"{name}ForCausalLM" for name in ("Qwen3Moe", "Mixtral", "Glm4Moe", "HyperRouter")
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
    "softmax with a choice bias": Case({"router": {**TOPK, "expert_bias": True}}, OWN, "--custom-code"),
}
REFUSED: dict[str, Case] = {
    "adds a bias to its logits": Case({"router": {"name": "hyper", "bias": True}}, ""),
    "divides each token's projection": Case({"router": {"name": "xmoe"}}, ""),
    "does not fold": Case({"router": {"name": "stablemoe"}}, ""),
    "do not sum to 1": Case({"router": {**TOPK, "pre_softmax": True}, **BARE}, ""),
    "moves a choice among softmax scores": Case({"router": {**TOPK, "expert_bias": True}}, ""),
    "--mlp-type residual": Case({"router": TOPK, "mlp_type": "residual"}, ""),
}
