"""Random numbers that depend only on (seed, name, element index): the same bits on every device, dtype and
version.

Element i is word i of a counter-based generator, SplitMix64 (Steele, Lea, Flood 2014) with a 128-bit key,
in integer arithmetic that wraps around.  Normal numbers use Wichura's inverse of the normal distribution
(AS 241, PPND16, 1988) in float64.  It consists of + - * / and sqrt, which IEEE 754 rounds in only one way;
the logarithm is our own for the same reason.  A compiler would fuse a product and a sum into one rounding,
so nothing here may be compiled.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_CHUNK = 1 << 17  # numbers at a time: bounds the memory of the dozen 8-byte temporaries

# AS 241: numerator and denominator, highest power first, for |p - 1/2| <= 0.425, and for tails with r =
# sqrt(-ln p) <= 5 and > 5 fmt: off
_CENTRE = (
    (
        2.5090809287301226727e3,
        3.3430575583588128105e4,
        6.7265770927008700853e4,
        4.5921953931549871457e4,
        1.3731693765509461125e4,
        1.9715909503065514427e3,
        1.3314166789178437745e2,
        3.3871328727963666080e0,
    ),
    (
        5.2264952788528545610e3,
        2.8729085735721942674e4,
        3.9307895800092710610e4,
        2.1213794301586595867e4,
        5.3941960214247511077e3,
        6.8718700749205790830e2,
        4.2313330701600911252e1,
        1.0,
    ),
)
_NEAR_TAIL = (
    (
        7.74545014278341407640e-4,
        2.27238449892691845833e-2,
        2.41780725177450611770e-1,
        1.27045825245236838258e0,
        3.64784832476320460504e0,
        5.76949722146069140550e0,
        4.63033784615654529590e0,
        1.42343711074968357734e0,
    ),
    (
        1.05075007164441684324e-9,
        5.47593808499534494600e-4,
        1.51986665636164571966e-2,
        1.48103976427480074590e-1,
        6.89767334985100004550e-1,
        1.67638483018380384940e0,
        2.05319162663775882187e0,
        1.0,
    ),
)
_FAR_TAIL = (
    (
        2.01033439929228813265e-7,
        2.71155556874348757815e-5,
        1.24266094738807843860e-3,
        2.65321895265761230930e-2,
        2.96560571828504891230e-1,
        1.78482653991729133580e0,
        5.46378491116411436990e0,
        6.65790464350110377720e0,
    ),
    (
        2.04426310338993978564e-15,
        1.42151175831644588870e-7,
        1.84631831751005468180e-5,
        7.86869131145613259100e-4,
        1.48753612908506148525e-2,
        1.36929880922735805310e-1,
        5.99832206555887937690e-1,
        1.0,
    ),
)
# fmt: on
# atanh(s) / s in powers of s^2; s^2 < 0.03, so the rest is below 1e-17
_LOG_SERIES = tuple(1.0 / odd for odd in range(19, 0, -2))


def normal(
    shape: Sequence[int], *, seed: int, name: str, device: torch.device | str = "cpu", start: int = 0
) -> Tensor:
    """Float32 N(0, 1) numbers; element i (row-major) is number ``start + i`` of the stream (seed, name),
    for any shape.

    No absolute value exceeds 8.3.  A number takes about 25 ns on one CPU core.
    """
    return _fill(shape, _standard_normal, seed=seed, name=name, device=device, start=start)


def uniform(
    shape: Sequence[int], *, seed: int, name: str, device: torch.device | str = "cpu", start: int = 0
) -> Tensor:
    """Float32 numbers in [0, 1), multiples of 2^-24; elements are numbered as in :func:`normal`."""
    return _fill(shape, _upper_24_bits, seed=seed, name=name, device=device, start=start)


def bits(counters: Tensor, *, seed: int, name: str) -> Tensor:
    """Replace each counter of an int64 tensor by 64 random bits, as int64: counter c by word c of the
    stream (seed, name).

    Unlike :func:`uniform`, this is for indices that are data, such as positions of tokens.  It only uses
    integer operations, so it can be compiled.
    """
    return _mix(counters, *_key(seed, name))


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256, in hexadecimal, of the tensors' bytes one after the other."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _fill(
    shape: Sequence[int],
    transform: Callable[[Tensor], Tensor],
    *,
    seed: int,
    name: str,
    device: torch.device | str,
    start: int,
) -> Tensor:
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"draw {name} outside torch.compile, because compiled code rounds float64 differently"
        )
    offset, twist = _key(seed, name)
    here = torch.device(device)
    place = here if here.type in ("cpu", "cuda") else torch.device("cpu")  # others may lack float64
    size = _CHUNK if place.type == "cpu" else _CHUNK << 5
    # the numbers may be trained on, wherever they are drawn
    with (
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        out = torch.empty(tuple(shape), dtype=torch.float32, device=place)
        flat = out.view(-1)
        for first in range(0, flat.numel(), size):
            chunk = flat[first : first + size]
            counter = torch.arange(
                start + first + 1, start + first + 1 + chunk.numel(), dtype=torch.int64, device=place
            )
            chunk.copy_(transform(_mix(counter, offset, twist)))
        return out.to(here)


def _key(seed: int, name: str) -> tuple[int, int]:
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(key[:8], "little", signed=True), int.from_bytes(key[8:16], "little", signed=True)


def _mix(counter: Tensor, offset: int, twist: int) -> Tensor:
    """64 random bits for each counter, in place; the twist keeps the words of two streams from
    overlapping.
    """
    z = counter.mul_(_signed(0x9E3779B97F4A7C15)).add_(offset)
    z.bitwise_xor_(_shift(z, 30)).mul_(_signed(0xBF58476D1CE4E5B9)).bitwise_xor_(twist)
    z.bitwise_xor_(_shift(z, 27)).mul_(_signed(0x94D049BB133111EB))
    return z.bitwise_xor_(_shift(z, 31))


def _upper_24_bits(bits: Tensor) -> Tensor:
    return _shift(bits, 40).to(torch.float64).mul_(2.0**-24)


def _standard_normal(bits: Tensor) -> Tensor:
    """float64 numbers: the inverse distribution at ``(n + 1/2) / 2^52``, n the upper 52 bits; never 0 or
    1.
    """
    # probability less 1/2, exact
    q = _shift(bits, 12).to(torch.float64).sub_(2.0**51 - 0.5).mul_(2.0**-52)
    z = _ratio(_CENTRE, torch.mul(q, q).neg_().add_(0.180625)).mul_(q)
    # 15 % of the numbers; their values from above are replaced
    tails = (q.abs() > 0.425).nonzero(as_tuple=True)
    q = q[tails]
    r = _log(0.5 - q.abs()).neg_().sqrt_()
    size = torch.where(r <= 5.0, _ratio(_NEAR_TAIL, r - 1.6), _ratio(_FAR_TAIL, r - 5.0))
    z[tails] = torch.where(q < 0.0, -size, size)
    return z


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float64 numbers, to about 1e-16, from exact operations."""
    mantissa, exponent = torch.frexp(x)
    low = mantissa < math.sqrt(0.5)
    mantissa = torch.where(low, mantissa * 2.0, mantissa)  # from sqrt(1/2) to sqrt(2)
    s = (mantissa - 1.0).div_(mantissa + 1.0)
    series = _polynomial(_LOG_SERIES, s * s).mul_(s).mul_(2.0)
    return (exponent.to(torch.float64) - low.to(torch.float64)).mul_(math.log(2.0)).add_(series)


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], r: Tensor) -> Tensor:
    return _polynomial(coefficients[0], r).div_(_polynomial(coefficients[1], r))


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Horner's rule, with a rounding after each product and each sum."""
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total.mul_(x).add_(coefficient)
    return total


def _shift(bits: Tensor, count: int) -> Tensor:
    """Logical shift to the right; torch's own shift copies the sign bit."""
    return torch.bitwise_right_shift(bits, count).bitwise_and_((1 << (64 - count)) - 1)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned word."""
    return word - (1 << 64) if word >> 63 else word
