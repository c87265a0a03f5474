"""Cases of the rules of config/rules: dense layers, shared experts, positions, attention."""

from __future__ import annotations

from config.rule_case import MEGATRON, TP2, case

SHARED = {"moe_shared_expert_intermediate_size": 64}
LATENT = {"multi_latent_attention": True}
YARN = {"rope_type": "yarn"}

CASES = [
    case(
        "layers_have_a_pattern",
        {"moe_layer_freq": "([0]*1+[1]*2)"},
        "--moe-layer-freq",
        "one entry for each of --num-layers = 4, not 3",
        {"moe_layer_freq": "([0]*1+[1]*3)"},
    ),
    case(
        "layers_have_a_pattern",
        {"moe_layer_freq": "__import__('os')"},
        "--moe-layer-freq",
        "a list of 0 and 1",
        {"moe_layer_freq": "1"},
    ),
    case(
        "layers_have_a_pattern",
        {"moe_layer_freq": "[0]*4"},
        "--moe-layer-freq",
        "no MoE layer",
        {"moe_layer_freq": "2"},
    ),
    case(
        "shared_expert_gate_needs_its_expert",
        {"moe_shared_expert_gate": True},
        "--moe-shared-expert-gate",
        "needs --moe-shared-expert-intermediate-size",
        SHARED,
    ),
    case(
        "shared_expert_gate_needs_its_expert",
        {**SHARED, "mlp_type": "residual"},
        "--mlp-type",
        "dense MLP beside the experts",
        {"mlp_type": "standard"},
    ),
    case(
        "dense_widths_by_tensor_parallel",
        {"moe_shared_expert_intermediate_size": 65, **TP2},
        "--moe-shared-expert-intermediate-size",
        "divisible by --tensor-model-parallel-size = 2",
        SHARED,
    ),
    case(
        "dense_widths_by_tensor_parallel",
        {"moe_layer_freq": "2", "ffn_hidden_size": 33, "moe_ffn_hidden_size": 32, **TP2},
        "--ffn-hidden-size",
        "divisible by --tensor-model-parallel-size = 2",
        {"moe_layer_freq": "1"},
    ),
    case(
        "stages_have_experts",
        {"moe_layer_freq": "[0,0,1,1]", "pipeline_model_parallel_size": 2},
        "--moe-layer-freq",
        "2 dense layers in a row, and a pipeline stage of 2",
        MEGATRON,
    ),
    case(
        "latent_settings_need_latent_attention",
        {"kv_lora_rank": 512},
        "--kv-lora-rank",
        "needs --multi-latent-attention",
        LATENT,
    ),
    case(
        "latent_attention_has_no_groups",
        {**LATENT, "num_query_groups": 2},
        "--num-query-groups",
        "own keys and values",
        {"num_query_groups": None},
    ),
    case(
        "latent_attention_has_no_groups",
        {**LATENT, "add_qkv_bias": True},
        "--add-qkv-bias",
        "does not apply",
        {"add_qkv_bias": False},
    ),
    case(
        "latent_attention_within_documents",
        {**LATENT, "reset_position_ids": True},
        "--reset-position-ids",
        "without --reset-attention-mask",
        {"reset_attention_mask": True},
    ),
    case(
        "one_scaling_of_positions",
        {**YARN, "use_rope_scaling": True},
        "--use-rope-scaling",
        "cannot be combined with --rope-type yarn",
        {"use_rope_scaling": False},
    ),
    case(
        "one_scaling_of_positions",
        {**YARN, "rotary_seq_len_interpolation_factor": 2.0},
        "--rotary-seq-len-interpolation-factor",
        "cannot be combined with --rope-type yarn",
        {"rotary_seq_len_interpolation_factor": 1.0},
    ),
    case(
        "one_scaling_of_positions",
        {"rope_scaling_factor": 4.0},
        "--rope-scaling-factor",
        "needs --use-rope-scaling",
        {"use_rope_scaling": True},
    ),
    case(
        "one_scaling_of_positions",
        {"mscale_all_dim": 1.0},
        "--mscale-all-dim",
        "needs --rope-type yarn",
        YARN,
    ),
    case(
        "rotary_channels_are_pairs",
        {"rotary_percent": 0.3},
        "--rotary-percent",
        "gives 19 channels to turn",
        {"rotary_percent": 0.25},
    ),
    case(
        "rotary_channels_are_pairs",
        {**LATENT, "qk_pos_emb_head_dim": 7},
        "--qk-pos-emb-head-dim",
        "gives 7 channels to turn",
        {"qk_pos_emb_head_dim": 8},
    ),
    case(
        "rotary_channels_are_pairs",
        {**YARN, "rotary_percent": 0.5},
        "--rotary-percent",
        "must be 1 with --rope-type yarn",
        {"rotary_percent": 1.0},
    ),
    case(
        "windows_fit_the_layers",
        {"window_size": "128,1"},
        "--window-size",
        "must be LEFT,0",
        {"window_size": "(128, 0)"},
    ),
    case(
        "windows_fit_the_layers",
        {"window_attn_skip_freq": "2"},
        "--window-attn-skip-freq",
        "needs --window-size",
        {"window_size": "128,0"},
    ),
    case(
        "windows_fit_the_layers",
        {"window_size": "4,0", "window_attn_skip_freq": "[1,0]"},
        "--window-size",
        "4 entries, one for each layer",
        {"window_attn_skip_freq": "[1,0]*2"},
    ),
    case(
        "mtp_within_its_engine",
        {**MEGATRON, "mtp_num_layers": 1, "reset_attention_mask": True},
        "--mtp-num-layers",
        "not supported with --reset-attention-mask",
        {"mtp_num_layers": None},
    ),
    case(
        "mtp_within_its_engine",
        {**MEGATRON, "mtp_num_layers": 1, "context_parallel_size": 2},
        "--mtp-num-layers",
        "context parallelism",
        {"context_parallel_size": 1},
    ),
]
