"""Noise by place, against SplitMix64 in Python's integers."""

from __future__ import annotations

import hashlib

import pytest
import torch

from megatron_hyperrouter.ops.jitter import jitter

WORD = (1 << 64) - 1


def word(counter: int, *, seed: int, name: str) -> int:
    """SplitMix64 with its key, from the description in ops/keyed.py."""
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    z = (counter * 0x9E3779B97F4A7C15 + int.from_bytes(key[:8], "little")) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & WORD) ^ int.from_bytes(key[8:16], "little")
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & WORD
    return z ^ (z >> 31)


@pytest.mark.parametrize("num_features", [1, 4, 7, 8])
def test_against_python_integers(num_features):
    places = [0, 5, 2**40 + 3]
    factors = jitter(torch.tensor(places), num_features, 0.25, seed=3, step=11, layer=2).tolist()
    words = -(-num_features // 4)
    for place, row in zip(places, factors, strict=True):
        for feature, factor in enumerate(row):
            bits = (
                word(place * words + feature // 4, seed=3, name="jitter.2.11") >> (16 * (feature % 4))
                & 0xFFFF
            )
            number = bits - (1 << 16) if bits >> 15 else bits
            assert factor == pytest.approx(1 + 0.25 * (number + 0.5) / 2**15, abs=1e-7)


def test_range_mean_and_spread():
    factors_TD = jitter(torch.arange(400), 250, 0.1, seed=1, step=0, layer=1).double()
    assert 0.9 <= float(factors_TD.min()) < 0.9001
    assert 1.0999 < float(factors_TD.max()) <= 1.1
    assert float(factors_TD.mean()) == pytest.approx(1.0, abs=1e-3)
    assert float(factors_TD.std()) == pytest.approx(0.1 / 3**0.5, rel=0.01)
    centred_TD = factors_TD - 1
    for shift in (1, 2, 4):  # neighbours share a word, but no bits
        correlation = (centred_TD[:, shift:] * centred_TD[:, :-shift]).mean() / centred_TD.square().mean()
        assert abs(float(correlation)) < 0.02


def test_a_token_has_its_noise_wherever_it_is():
    together_TD = jitter(torch.arange(6), 8, 0.1, seed=1, step=4, layer=1)
    assert torch.equal(jitter(torch.tensor([5, 2]), 8, 0.1, seed=1, step=4, layer=1), together_TD[[5, 2]])
    for change in ({"seed": 2}, {"step": 5}, {"layer": 2}):
        other_TD = jitter(torch.arange(6), 8, 0.1, **{"seed": 1, "step": 4, "layer": 1, **change})
        assert float((other_TD == together_TD).float().mean()) < 0.1
