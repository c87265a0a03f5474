"""Borders of documents against megatron-core's own dataset, and rotary positions that are turned back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

from megatron_hyperrouter.model.attention.documents import document_starts, same_document, turned_back

EOD = 3


@given(st.lists(st.integers(0, EOD), min_size=1, max_size=12))
def test_borders_are_those_of_megatron_core(ids: list[int]) -> None:
    tokens_S = torch.tensor(ids)
    hidden, counted, positions, *_ = _get_ltor_masks_and_position_ids(tokens_S, EOD, True, True, True, True)
    starts_BS = document_starts(torch.stack([tokens_S, torch.full_like(tokens_S, EOD)]), EOD)
    places = torch.arange(len(ids))
    assert (places - starts_BS[0]).tolist() == positions.tolist()
    assert starts_BS[1].tolist() == places.tolist()  # a sample of ends alone: the rows are apart
    seen = same_document(starts_BS, places, places)[:1] & (places[:, None] >= places)
    assert seen[0, 0].tolist() == (~hidden[0]).tolist()
    assert (tokens_S != EOD).tolist() == counted.bool().tolist()


def test_some_queries_of_a_sequence() -> None:
    starts_BS = document_starts(torch.tensor([[0, EOD, 1, 2, EOD, 0]]), EOD)
    queries, keys = torch.tensor([5, 0]), torch.tensor([4, 5, 1])
    assert same_document(starts_BS, queries, keys).tolist() == [
        [[[False, True, False], [False, False, True]]]
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turned_back_is_the_rotation_of_the_smaller_position(dtype: torch.dtype) -> None:
    positions, starts, channels, base = [5, 9, 2], [3, 0, 2], 6, 100.0
    x_SBNC = torch.randn(3, 1, 2, channels, dtype=torch.float64)

    def rotated(position: int, x_NC: torch.Tensor) -> torch.Tensor:
        out = x_NC.clone()
        for i in range(channels // 2):
            angle = position * base ** (-2 * i / channels)
            out[:, i] = x_NC[:, i] * math.cos(angle) - x_NC[:, i + channels // 2] * math.sin(angle)
            out[:, i + channels // 2] = x_NC[:, i + channels // 2] * math.cos(angle) + x_NC[:, i] * math.sin(
                angle
            )
        return out

    before = torch.stack([rotated(p, x[0])[None] for p, x in zip(positions, x_SBNC, strict=True)]).to(dtype)
    expected = torch.stack(
        [rotated(p - s, x[0])[None] for p, s, x in zip(positions, starts, x_SBNC, strict=True)]
    )
    rates_R = base ** (-torch.arange(0, channels, 2) / channels)
    found = turned_back(before, torch.tensor(starts)[:, None], rates_R)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2
    )
    wide = turned_back(torch.cat([before, before], -1), torch.tensor(starts)[:, None], rates_R)
    assert torch.equal(wide[..., :channels], found) and torch.equal(wide[..., channels:], before)
