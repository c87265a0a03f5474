"""The parts of the layer spec that stand by themselves."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hyperrouter.config.cli import replace_leaves
from megatron_hyperrouter.config.derived import expert_width
from megatron_hyperrouter.config.tree import ModelConfig, RunConfig, TrainConfig
from megatron_hyperrouter.model.spec import RMSNorm, fp8_fields, padded_vocab_size, transformer_config


def run_of(**sizes: object) -> RunConfig:
    return RunConfig(model=ModelConfig(**sizes))  # type: ignore[arg-type]


def test_rms_norm_is_its_formula() -> None:
    norm = RMSNorm(transformer_config(run_of()), 12, eps=0.1)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(12))
    x = torch.randn(3, 12)
    expected = x / (x.double().pow(2).mean(-1, keepdim=True) + 0.1).sqrt().float() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert norm.weight.sequence_parallel is False


@pytest.mark.parametrize(
    ("vocabulary", "multiple", "rows"), [(257, 128, 384), (256, 128, 256), (1, 8, 8), (50257, 128, 50304)]
)
def test_padded_vocabulary(vocabulary: int, multiple: int, rows: int) -> None:
    assert padded_vocab_size(vocabulary, run_of(make_vocab_size_divisible_by=multiple)) == rows


@pytest.mark.parametrize(("ranks", "rows"), [(1, 151936), (2, 151936), (4, 151936), (3, 153123)])
def test_vocabulary_padded_as_megatron_lm_does(ranks: int, rows: int) -> None:
    """Qwen3's 151,643 ids to a multiple of 1187 x TP (build_tokenizer.py): 128 x 1187 = 151,936."""
    run = run_of(make_vocab_size_divisible_by=1187, pad_vocab_size_to_tp=True)
    run = replace_leaves(run, tensor_model_parallel_size=ranks)
    assert padded_vocab_size(151643, run) == rows


@pytest.mark.parametrize(
    ("sizes", "width"),
    [
        ({"hidden_size": 64}, 256),
        ({"ffn_hidden_size": 100}, 100),
        ({"ffn_hidden_size": 100, "moe_ffn_hidden_size": 24}, 24),
    ],
)
def test_expert_width(sizes: dict[str, int], width: int) -> None:
    assert expert_width(run_of(**sizes)) == transformer_config(run_of(**sizes)).moe_ffn_hidden_size == width


def test_settings_reach_megatron_core() -> None:
    sizes = {
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "kv_channels": 20,
        "norm_epsilon": 1e-3,
        "hidden_dropout": 0.2,
    }
    config = transformer_config(run_of(**sizes, moe_router_topk=1))
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (8, 2, 20)
    assert (config.layernorm_epsilon, config.hidden_dropout, config.attention_dropout) == (1e-3, 0.2, 0.0)
    assert config.params_dtype == torch.float32 and not config.bf16
    half = transformer_config(RunConfig(train=TrainConfig(bf16=True)))
    assert half.params_dtype == torch.bfloat16 and half.bf16


def test_fp8_settings_are_fields_of_megatron_core() -> None:
    run = replace_leaves(
        RunConfig(), fp8_format="hybrid", fp8_recipe="blockwise", no_fp8_wgrad=True, fp8_amax_history_len=5
    )
    given = fp8_fields(run)
    assert given.keys() <= {each.name for each in fields(TransformerConfig)}
    assert (given["fp8"], given["fp8_recipe"], given["fp8_wgrad"]) == ("hybrid", "blockwise", False)
    assert given["fp8_amax_history_len"] == 5
    assert fp8_fields(RunConfig()) == {}
