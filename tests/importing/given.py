"""Random models of transformers' own classes, saved as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "initializer_range": 0.15,
    "hidden_act": "silu",
    "bos_token_id": None,
    "eos_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 48}
YARN_FROM: dict[str, Any] = {"original_max_position_embeddings": 16}
MSCALE: dict[str, Any] = {"mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}
LATENT: dict[str, Any] = {
    "vocab_size": 96,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "moe_intermediate_size": 24,
    "intermediate_size": 48,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3Moe",
        {"vocab_size": 100, "head_dim": 12, "num_experts": 8, "norm_topk_prob": True, "rms_norm_eps": 1e-6}
        | {"tie_word_embeddings": False, **EXPERTS},
    ),
    "qwen3_moe, not renormalised": (
        "Qwen3Moe",
        {"vocab_size": 96, "head_dim": 8, "num_experts": 8, "norm_topk_prob": False, "rms_norm_eps": 1e-5}
        | {"tie_word_embeddings": True, **EXPERTS},
    ),
    "mixtral": (
        "Mixtral",
        {"vocab_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24}
        | {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window": None},
    ),
    "glm4_moe": (
        "Glm4Moe",
        {"vocab_size": 96, "head_dim": 8, "n_routed_experts": 8, "n_shared_experts": 0, "n_group": 1}
        | {"topk_group": 1, "first_k_dense_replace": 0, "norm_topk_prob": True, "routed_scaling_factor": 1.0}
        | {"use_qk_norm": True, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, **EXPERTS}
        | {"rope_parameters": {**COMMON["rope_parameters"], "partial_rotary_factor": 1.0}},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {"vocab_size": 96, "num_experts": 8, "norm_topk_prob": False, "rms_norm_eps": 1e-5, **EXPERTS}
        | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0], "tie_word_embeddings": False},
    ),
    "qwen3_moe, a dense layer": (
        "Qwen3Moe",
        {"vocab_size": 96, "head_dim": 8, "num_experts": 8, "norm_topk_prob": True, "rms_norm_eps": 1e-5}
        | {"tie_word_embeddings": False, "decoder_sparse_step": 2, **EXPERTS}
        | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, **YARN_FROM}},
    ),
    "glm4_moe, shared experts, groups": (
        "Glm4Moe",
        {"vocab_size": 96, "head_dim": 8, "n_routed_experts": 8, "n_shared_experts": 2, "n_group": 4}
        | {"topk_group": 2, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
        | {"use_qk_norm": False, "attention_bias": True, "rms_norm_eps": 1e-5, **EXPERTS}
        | {"num_experts_per_tok": 4, "tie_word_embeddings": False}
        | {"rope_parameters": {**COMMON["rope_parameters"], "partial_rotary_factor": 0.5}},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {**LATENT, "n_shared_experts": 2, "q_lora_rank": None, "n_group": 1, "topk_group": 1}
        | {"topk_method": "greedy", "routed_scaling_factor": 1.5, "norm_topk_prob": False}
        | {"num_experts_per_tok": 2},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {**LATENT, "n_shared_experts": 1, "q_lora_rank": 14, "n_group": 4, "topk_group": 2}
        | {"routed_scaling_factor": 2.5, "norm_topk_prob": True, "num_experts_per_tok": 4}
        | {"num_nextn_predict_layers": 0}
        | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, **YARN_FROM, **MSCALE}},
    ),
    "llama": ("Llama", {"vocab_size": 96, "intermediate_size": 48, "rms_norm_eps": 1e-5}),
    "mistral": (
        "Mistral",
        {"vocab_size": 96, "intermediate_size": 48, "rms_norm_eps": 1e-5, "sliding_window": None},
    ),
    "qwen3": (
        "Qwen3",
        {"vocab_size": 96, "head_dim": 12, "intermediate_size": 48, "rms_norm_eps": 1e-6}
        | {"tie_word_embeddings": True},
    ),
}


def make_model(name: str, folder: Path, *, packed: bool = False, dtype: str = "float32") -> None:
    """Save a random model whose every part bears on the logits."""
    import transformers

    kind, settings = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**(COMMON | settings))
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for label, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in label:
                tensor.add_(0.2 * torch.randn_like(tensor))
            elif "correction_bias" in label:
                tensor.copy_(0.05 * torch.randn_like(tensor))
            elif label.endswith("gate.weight"):
                tensor.copy_(0.3 * torch.randn_like(tensor))
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, **({"save_original_format": False} if packed else {}))


def edit_config(folder: Path, **changes: Any) -> None:
    """Other fields in ``config.json``."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
