"""DeepSpeed's parameter names on any rank, and the global ones."""

from __future__ import annotations

import pytest

from megatron_hyperrouter.engines.deepspeed.names import global_name

MOE = "mlp.moe.deepspeed_moe"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tied_modules.embed.embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("0.embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("1.input_layernorm.weight", "decoder.layers.0.input_layernorm.weight"),
        ("12.self_attention.linear_qkv.weight", "decoder.layers.11.self_attention.linear_qkv.weight"),
        (f"12.{MOE}.gate.router.embedding_S", "decoder.layers.11.mlp.router.embedding_S"),
        (
            f"2.{MOE}.experts.deepspeed_experts.3.linear_fc1.weight",
            "decoder.layers.1.mlp.experts.local_experts.7.linear_fc1.weight",
        ),
        (
            f"2.{MOE}.experts.linear_fc1_LGD",
            "decoder.layers.1.mlp.experts.local_experts.4:8.linear_fc1.weight",
        ),
        ("3.mlp.moe.mlp.linear_fc1.weight", "decoder.layers.2.mlp.residual.linear_fc1.weight"),
        ("3.mlp.moe.coefficient.bias", "decoder.layers.2.mlp.coefficient.bias"),
        ("13.weight", "decoder.final_layernorm.weight"),
        ("14.output_layer.weight", "output_layer.weight"),
    ],
)
def test_each_kind(name: str, expected: str) -> None:
    assert global_name(name, num_layers=12, first_expert=4, experts=4) == expected


def test_no_two_parameters_share_a_name() -> None:
    names = [
        f"{layer}.{MOE}.experts.deepspeed_experts.{expert}.linear_fc2.weight"
        for layer in range(1, 13)
        for expert in range(4)
    ]
    found = {global_name(name, num_layers=12, first_expert=first) for name in names for first in (0, 4)}
    assert len(found) == 2 * len(names)


def test_a_parameter_of_no_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="does not belong to any layer"):
        global_name("loss.weight", num_layers=2, first_expert=0)
