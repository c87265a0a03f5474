"""The table of rotary angles, against its formula and megatron-core's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_hyperrouter.config.sections.attention import AttentionConfig
from megatron_hyperrouter.config.tree import ModelConfig, RunConfig
from megatron_hyperrouter.model.attention.rotary import RotaryTable, concentration, rates

CPU = torch.device("cpu")


def rates_of(channels: int, base: float, **settings: Any) -> torch.Tensor:
    """The rates of a run with heads of this width."""
    model = ModelConfig(kv_channels=channels, rotary_base=base)
    return rates(RunConfig(model=model, attention=AttentionConfig(**settings)))


def test_is_position_times_rate() -> None:
    table = RotaryTable(rates_of(6, 100.0))(5, CPU)
    assert table.shape == (5, 1, 1, 6) and table.dtype == torch.float32
    for position in range(5):
        rates = [100 ** (-2 * pair / 6) for pair in range(3)]
        assert table[position, 0, 0].tolist() == pytest.approx(
            [position * rate for rate in rates * 2], rel=1e-6
        )


@pytest.mark.parametrize(("channels", "base", "length"), [(64, 10000, 300), (8, 500000, 33)])
def test_is_megatron_cores(monkeypatch: pytest.MonkeyPatch, channels: int, base: int, length: int) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: CPU)  # which it asks for on any machine
    theirs = RotaryEmbedding(channels, rotary_percent=1.0, rotary_base=base, use_cpu_initialization=True)
    torch.testing.assert_close(
        RotaryTable(rates_of(channels, base))(length, CPU), theirs(length), rtol=1e-6, atol=0
    )


def test_grows_and_keeps_float32() -> None:
    module = RotaryTable(rates_of(8, 10000.0)).bfloat16()
    short, long = module(4, CPU), module(300, CPU)
    assert torch.equal(long[:4], short) and torch.equal(module(4, CPU), short)
    assert module.bfloat16()(300, CPU).dtype == torch.float32  # position 257 is no bfloat16
    assert not module.state_dict()


@pytest.mark.parametrize("factor", [2.0, 8.0])
def test_llama3_scaling_is_megatron_cores(factor: float) -> None:
    theirs = RotaryEmbedding(
        64,
        rotary_percent=1.0,
        rotary_base=500000,
        rope_scaling=True,
        rope_scaling_factor=factor,
        use_cpu_initialization=True,
    )
    ours = rates_of(64, 500000.0, use_rope_scaling=True, rope_scaling_factor=factor)
    torch.testing.assert_close(ours, theirs.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_scaling_is_that_of_transformers(kind: str) -> None:
    """The functions that Llama 3.1 and DeepSeek-V3 are loaded with there."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.5, "factor": 40.0}
    ours: dict[str, Any] = {"rotary_seq_len_interpolation_factor": 40.0}
    if kind == "llama3":
        theirs |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        ours = {"use_rope_scaling": True, "rope_scaling_factor": 40.0}
    if kind == "yarn":
        theirs |= {"beta_fast": 24, "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.7}
        theirs |= {"original_max_position_embeddings": 2048}
        ours = {"rope_type": "yarn", "rotary_scaling_factor": 40.0, "beta_fast": 24.0, "beta_slow": 2.0}
        ours |= {"mscale_all_dim": 0.7, "original_max_position_embeddings": 2048}
    config = LlamaConfig(hidden_size=64, num_attention_heads=1, head_dim=64, rope_parameters=theirs)
    expected, length = ROPE_INIT_FUNCTIONS[kind](config, CPU)
    torch.testing.assert_close(rates_of(64, 10000.5, **ours), expected, rtol=1e-5, atol=0)
    run = RunConfig(attention=AttentionConfig(**ours))
    assert concentration(run) == pytest.approx(length, rel=1e-6)


def test_a_part_of_the_channels() -> None:
    assert torch.equal(rates_of(64, 10000.0, rotary_percent=0.25), rates_of(16, 10000.0))
