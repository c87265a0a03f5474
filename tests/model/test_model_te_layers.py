"""Names of Transformer Engine's fused and grouped parameters; without it, a spec has torch's classes."""

from __future__ import annotations

import pytest
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_hyperrouter.config.tree import EngineConfig, ModelConfig, RunConfig, TrainConfig
from megatron_hyperrouter.model.attention.core import ScaledDotProductAttention
from megatron_hyperrouter.model.names import plain_name
from megatron_hyperrouter.model.spec import RMSNorm, expert_spec, last_norm, layer_spec, transformer_config

LAYER = "decoder.layers.3"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{LAYER}.self_attention.linear_qkv.layer_norm_weight", f"{LAYER}.input_layernorm.weight"),
        (f"{LAYER}.mlp.experts.linear_fc1.weight0", f"{LAYER}.mlp.experts.local_experts.0.linear_fc1.weight"),
        (
            f"{LAYER}.mlp.experts.linear_fc2.weight12",
            f"{LAYER}.mlp.experts.local_experts.12.linear_fc2.weight",
        ),
        (f"{LAYER}.self_attention.linear_qkv.weight", f"{LAYER}.self_attention.linear_qkv.weight"),
        (f"{LAYER}.self_attention.q_layernorm.weight", f"{LAYER}.self_attention.q_layernorm.weight"),
        (
            f"{LAYER}.mlp.experts.local_experts.1.linear_fc1.weight",
            f"{LAYER}.mlp.experts.local_experts.1.linear_fc1.weight",
        ),
        (f"{LAYER}.mlp.router.router.weight_ED", f"{LAYER}.mlp.router.router.weight_ED"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert plain_name(name) == expected


def run_with(impl: str) -> RunConfig:
    engine = EngineConfig(engine="megatron", transformer_impl=impl)  # type: ignore[arg-type]
    return RunConfig(
        engine=engine,
        model=ModelConfig(qk_layernorm=True),
        train=TrainConfig(recompute_granularity="selective"),
    )


@pytest.mark.parametrize("impl", ["local", "auto"])
def test_classes_without(impl: str) -> None:
    run = run_with(impl)
    parts = layer_spec(run, ModuleSpec(module=object)).submodules
    assert parts.self_attention.submodules.core_attention.module is ScaledDotProductAttention
    assert parts.input_layernorm is parts.pre_mlp_layernorm is last_norm(run) is RMSNorm
    assert expert_spec(run).module is SequentialMLP
    config = transformer_config(run)
    assert not config.moe_grouped_gemm and config.recompute_granularity is None
