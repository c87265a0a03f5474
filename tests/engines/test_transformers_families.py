"""Model families are what transformers computes with the same weights, in one process of either engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from program.launched import Zygote

WORKER = Path(__file__).with_name("transformers_worker.py")
TOLERANCE = 1e-5  # of the logits, relative to the largest
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
TINY = "--qk-layernorm false --untie-embeddings-and-output-weights --router.name topk"
LATENT_SIZES = {
    **SIZES,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,  # which the norms of the latent vectors have whatever this is
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
}
LATENT = (
    "--num-query-groups 4 --multi-latent-attention --qk-layernorm --norm-epsilon 1e-6 --kv-lora-rank 12 "
    "--qk-head-dim 8 --qk-pos-emb-head-dim 6 --v-head-dim 10 --moe-layer-freq [0,1] --ffn-hidden-size 40 "
    "--moe-ffn-hidden-size 24 --num-experts 8 --moe-router-topk 4"
)
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "Mixtral, sliding window": (
        "Mixtral",
        {
            **SIZES,
            "intermediate_size": 48,
            "num_local_experts": 4,
            "sliding_window": 5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.5},
        },
        "--window-size 4,0 --rotary-base 1000000.5",
    ),
    "Qwen2-MoE": (
        "Qwen2Moe",
        {
            **SIZES,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 24,
            "intermediate_size": 40,
            "mlp_only_layers": [0],
        },
        "--add-qkv-bias --router.pre-softmax --moe-shared-expert-intermediate-size 24 "
        "--moe-shared-expert-gate --moe-layer-freq [0,1] --ffn-hidden-size 40",
    ),
    "Qwen3-MoE, YaRN": (
        "Qwen3Moe",
        {
            **SIZES,
            "head_dim": 12,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        "--kv-channels 12 --qk-layernorm --rope-type yarn --rotary-scaling-factor 4 "
        "--original-max-position-embeddings 16",
    ),
    "DeepSeek-V2-Lite": (
        "DeepseekV2",
        {
            **LATENT_SIZES,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.5,
        },
        f"{LATENT} --rope-type rope --router.pre-softmax --router.scaling-factor 1.5 "
        "--moe-shared-expert-intermediate-size 48",
    ),
    "DeepSeek-V3, YaRN": (
        "DeepseekV3",
        {
            **LATENT_SIZES,
            "q_lora_rank": 14,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "mscale": 0.7,
                "mscale_all_dim": 1.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "original_max_position_embeddings": 16,
            },
        },
        f"{LATENT} --q-lora-rank 14 --rotary-scaling-factor 8 --original-max-position-embeddings 16 "
        "--mscale 0.7 --mscale-all-dim 1 --router.score-function sigmoid --router.renormalise "
        "--router.expert-bias --router.num-groups 4 --router.group-topk 2 --router.scaling-factor 2.5 "
        "--moe-shared-expert-intermediate-size 24",
    ),
}


@pytest.fixture(scope="module")
def told(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    cases = [
        {"family": [name, fields], "flags": [*TINY.split(), *flags.split()]}
        for name, fields, flags in FAMILIES.values()
    ]
    folder = tmp_path_factory.mktemp("families")
    answers = run_ranks(zygote, WORKER, {"cases": cases}, ranks=1, folder=folder, timeout=300)
    return dict(zip(FAMILIES, answers, strict=True))


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(told: dict[str, Any], family: str, engine: str) -> None:
    assert told[family]["largest"] > 1.0  # the weights are large enough to matter
    assert told[family][engine] <= TOLERANCE
