"""Sampling of the next token."""

from __future__ import annotations

import torch

from megatron_hyperrouter.generation.sampling import Style, choose, padded

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0])


def shares(style: Style, draws: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    chosen = torch.tensor([choose(LOGITS, style, generator) for _ in range(draws)])
    return torch.bincount(chosen, minlength=4) / draws


def test_greedy_takes_the_likeliest() -> None:
    for temperature in (0.0, 1e-320, 1e-38, 1e-30):
        assert choose(LOGITS, Style(temperature=temperature), torch.Generator()) == 1


def test_draws_follow_the_temperature() -> None:
    for temperature in (0.5, 1.0, 3.0):
        expected = (LOGITS / temperature).softmax(-1)
        torch.testing.assert_close(shares(Style(temperature=temperature)), expected, rtol=0, atol=0.03)


def test_top_p_keeps_the_likeliest_tokens_of_that_mass() -> None:
    probs = LOGITS.softmax(-1)  # 0.087, 0.644, 0.237, 0.032
    kept = torch.tensor([0.0, 1.0, 1.0, 0.0]) * probs
    torch.testing.assert_close(
        shares(Style(temperature=1.0, top_p=0.8)), kept / kept.sum(), rtol=0, atol=0.03
    )
    assert shares(Style(temperature=1.0, top_p=0.1))[1] == 1.0


def test_short_prompts_are_padded_in_front() -> None:
    ids_BP, hidden_BP = padded([[5], [7, 8, 9]])
    assert ids_BP.tolist() == [[0, 0, 5], [7, 8, 9]]
    assert hidden_BP.tolist() == [[True, True, False], [False, False, False]]
