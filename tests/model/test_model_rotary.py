"""The table of rotary angles, against its formula and megatron-core's own."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_hyperrouter.model.rotary import RotaryTable

CPU = torch.device("cpu")


def test_is_position_times_rate() -> None:
    table = RotaryTable(6, base=100)(5, CPU)
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
    torch.testing.assert_close(RotaryTable(channels, base)(length, CPU), theirs(length), rtol=1e-6, atol=0)


def test_grows_and_keeps_float32() -> None:
    module = RotaryTable(8, 10000).bfloat16()
    short, long = module(4, CPU), module(300, CPU)
    assert torch.equal(long[:4], short) and torch.equal(module(4, CPU), short)
    assert module.bfloat16()(300, CPU).dtype == torch.float32  # position 257 is no bfloat16
    assert not module.state_dict()
