"""Cases of the rules of config/rules: dense layers, shared experts, positions, attention."""

from __future__ import annotations

from config.rule_case import TP2, case

SHARED = {"moe_shared_expert_intermediate_size": 64}

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
]
