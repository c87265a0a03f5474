"""Keyed numbers, against an implementation in Python integers and floats."""

from __future__ import annotations

import hashlib
import struct
from statistics import NormalDist

import pytest
import torch

from megatron_hyperrouter.ops import keyed

MASK = (1 << 64) - 1


def word(index: int, *, seed: int, name: str) -> int:
    """SplitMix64 in Python integers, with its second key."""
    offset, twist = struct.unpack_from("<QQ", hashlib.sha256(f"{seed}:{name}".encode()).digest())
    z = (offset + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK) ^ twist
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


@pytest.mark.parametrize(("seed", "name"), [(1234, "hypernet.layer1.w1"), (0, ""), (2**70, "ä/β")])
def test_numbers_are_those_of_python_integers_and_floats(seed, name):
    words = [word(i, seed=seed, name=name) for i in range(2000)]
    expected = [float32(NormalDist().inv_cdf(((w >> 12) + 0.5) / 2**52)) for w in words]
    assert keyed.normal((2000,), seed=seed, name=name).tolist() == expected
    assert keyed.uniform((2000,), seed=seed, name=name).tolist() == [(w >> 40) / 2**24 for w in words]


def test_inverse_distribution_far_out_in_the_tails():
    upper = [0, 1, 2, 1000, 2**20, 2**40, 2**51 - 1, 2**51, 2**52 - 2**20, 2**52 - 2, 2**52 - 1]
    numbers = keyed._standard_normal(
        torch.tensor([n << 12 if n < 2**51 else (n << 12) - 2**64 for n in upper])
    ).tolist()
    assert numbers == pytest.approx([NormalDist().inv_cdf((n + 0.5) / 2**52) for n in upper], rel=1e-14)
    assert max(numbers) < 8.3


def test_moments_and_distribution():
    n = 200_000
    x = keyed.normal((n,), seed=5, name="moments").double()
    mean, std = x.mean().item(), x.std().item()
    skew, kurtosis = (((x - mean) / std) ** 3).mean().item(), (((x - mean) / std) ** 4).mean().item()
    assert abs(mean) < 4 / n**0.5
    assert abs(std - 1) < 4 / (2 * n) ** 0.5
    assert abs(skew) < 4 * (6 / n) ** 0.5
    assert abs(kurtosis - 3) < 4 * (24 / n) ** 0.5
    assert kolmogorov_distance(torch.special.ndtr(x)) < 1.63 / n**0.5
    assert kolmogorov_distance(keyed.uniform((n,), seed=5, name="moments").double()) < 1.63 / n**0.5


def kolmogorov_distance(uniform: torch.Tensor) -> float:
    x, n = uniform.sort().values, len(uniform)
    return (x - torch.arange(n) / n).abs().max().item()


@pytest.mark.parametrize("other", [{"name": "b"}, {"seed": 2}, {"start": 1}, {"start": 64}])
def test_streams_and_neighbours_are_uncorrelated(other):
    n = 100_000
    x, y = (keyed.normal((n,), **{"seed": 1, "name": "a", **change}) for change in ({}, other))
    assert abs((x * y).mean().item()) < 4 / n**0.5


def test_element_i_depends_on_neither_shape_nor_place(monkeypatch):
    whole = keyed.normal((6000,), seed=3, name="w")
    assert torch.equal(keyed.normal((100,), seed=3, name="w"), whole[:100])
    assert torch.equal(keyed.normal((20, 300), seed=3, name="w"), whole.view(20, 300))
    assert torch.equal(keyed.normal((5, 10), seed=3, name="w", start=1234), whole[1234:1284].view(5, 10))
    monkeypatch.setattr(keyed, "_CHUNK", 7)
    assert torch.equal(keyed.normal((600,), seed=3, name="w"), whole[:600])
    assert keyed.normal((0, 4), seed=3, name="w").shape == (0, 4)
    assert keyed.normal((), seed=3, name="w") == whole[0]


def test_torch_settings_do_not_touch_the_stream():
    plain = keyed.normal((999,), seed=4, name="w")
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        torch.manual_seed(99)
        with torch.device("meta"), torch.autocast("cpu"), torch.inference_mode():
            again = keyed.normal((999,), seed=4, name="w")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    assert again.dtype == torch.float32
    assert not again.is_inference()
    assert torch.equal(plain, again)


@pytest.mark.gpu
def test_a_gpu_draws_the_same_bits():
    on_gpu = keyed.normal((300_000,), seed=4, name="w", device="cuda").cpu()
    assert torch.equal(on_gpu, keyed.normal((300_000,), seed=4, name="w"))


def test_a_compiler_is_refused():
    # an earlier test may have started megatron-core, which makes this process run eagerly on a CPU
    compiles = torch.compiler.set_stance("default")
    with compiles, pytest.raises(Exception, match=r"outside torch\.compile"):
        torch.compile(lambda: keyed.normal((4,), seed=1, name="w"), backend="eager", fullgraph=True)()


def test_digest_is_that_of_the_bytes():
    a, b = torch.arange(6, dtype=torch.float32).view(2, 3), torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    raw = struct.pack("<6f", 0, 3, 1, 4, 2, 5) + struct.pack("<2H", 0x3FC0, 0xC000) + struct.pack("<q", 7)
    assert keyed.digest([a.t(), b, torch.tensor(7)]) == hashlib.sha256(raw).hexdigest()


def test_bits_are_the_words_that_uniform_numbers_are_made_of():
    places = torch.tensor([4, 1, 9])
    words = keyed.bits(places + 1, seed=3, name="a")  # element i of a stream is word i + 1
    expected = keyed.uniform((10,), seed=3, name="a")[places]
    assert torch.equal(((words >> 40) & (2**24 - 1)) * 2.0**-24, expected)
