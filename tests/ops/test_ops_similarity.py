"""CKA against the H-centred formula in plain-Python loops, in float64; its invariances; and the cases where
it is 0 / 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from cka_loops import cka, linear_kernel, rbf_kernel
from torch import Tensor

from megatron_hyperrouter.ops.similarity import linear_cka, median_distance, rbf_cka

CKAS: dict[str, Callable[..., Tensor]] = {
    "linear": linear_cka,
    "rbf": lambda x_ND, y_ND, valid_N=None: rbf_cka(x_ND, y_ND, 1.5, valid_N),
}


KERNELS = {"linear": linear_kernel, "rbf": rbf_kernel(1.5)}


def two_sides(
    num_tokens: int, features: tuple[int, int] = (4, 6), dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Related, but not the same."""
    generator = torch.Generator().manual_seed(num_tokens)
    x_ND, y_ND = (
        torch.randn(num_tokens, size, generator=generator, dtype=torch.float64) for size in features
    )
    shared = min(features)
    y_ND[:, :shared] += x_ND[:, :shared]
    return (x_ND + 3.0).to(dtype), (0.5 * y_ND).to(dtype)


@pytest.mark.parametrize(
    "num_tokens", [3, 5, 11]
)  # both forms of the linear one: fewer tokens than features, and more
@pytest.mark.parametrize("name", CKAS)
def test_against_loops(name, num_tokens):
    x_ND, y_ND = two_sides(num_tokens)
    expected = cka(x_ND.double().tolist(), y_ND.double().tolist(), KERNELS[name])
    assert 0.01 < expected < 0.99
    assert float(CKAS[name](x_ND, y_ND)) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("num_tokens", [5, 11])
@pytest.mark.parametrize("name", CKAS)
def test_gradients_against_finite_differences(name, num_tokens):
    sides = [side.requires_grad_() for side in two_sides(num_tokens, dtype=torch.float64)]
    assert torch.autograd.gradcheck(CKAS[name], sides)
    valid_N = torch.arange(num_tokens) % 4 != 1
    assert torch.autograd.gradcheck(lambda x_ND, y_ND: CKAS[name](x_ND, y_ND, valid_N), sides)
    singles = [side.detach().float().requires_grad_() for side in sides]
    for exact, rounded in zip(
        torch.autograd.grad(CKAS[name](*sides), sides),
        torch.autograd.grad(CKAS[name](*singles), singles),
        strict=True,
    ):
        torch.testing.assert_close(rounded.double(), exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CKAS)
def test_rows_that_do_not_exist_have_no_say(name):
    many, few = two_sides(9), two_sides(5)
    x_RND, y_RND = (
        torch.stack((a, torch.cat((b, torch.full_like(b[:4], torch.nan)))))
        for a, b in zip(many, few, strict=True)
    )
    valid_RN = torch.arange(9) < torch.tensor([[9], [5]])
    found_R = CKAS[name](x_RND, y_RND, valid_RN)
    torch.testing.assert_close(found_R, torch.stack((CKAS[name](*many), CKAS[name](*few))))
    distances_R = median_distance(x_RND, valid_RN)
    torch.testing.assert_close(distances_R, torch.stack((median_distance(many[0]), median_distance(few[0]))))


@pytest.mark.parametrize("name", CKAS)
def test_rotations_and_permutations_of_tokens_change_nothing(name):
    x_ND, y_ND = two_sides(20)
    rotation_DD = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1))).Q
    before = CKAS[name](x_ND, y_ND)
    torch.testing.assert_close(CKAS[name](x_ND @ rotation_DD, y_ND), before)
    torch.testing.assert_close(CKAS[name](x_ND + 7.0, y_ND - 2.0), before, rtol=1e-4, atol=1e-5)
    order_N = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(CKAS[name](x_ND[order_N], y_ND[order_N]), before)
    torch.testing.assert_close(CKAS[name](y_ND, x_ND), before)
    torch.testing.assert_close(CKAS[name](x_ND, x_ND), torch.tensor(1.0))
    assert abs(CKAS[name](x_ND[order_N], y_ND) - before) > 0.05  # tokens have to correspond


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e12])
def test_scaling(scale):
    x_ND, y_ND = two_sides(20)
    torch.testing.assert_close(linear_cka(scale * x_ND, y_ND), linear_cka(x_ND, y_ND))
    at_median = [rbf_cka(a / median_distance(a), y_ND, 0.8) for a in (x_ND, scale * x_ND)]
    torch.testing.assert_close(*at_median)
    torch.testing.assert_close(rbf_cka(4.0 * x_ND, 4.0 * y_ND, 4.0), rbf_cka(x_ND, y_ND, 1.0))


def test_an_absolute_sigma_far_below_the_distances_sees_collapse_everywhere():
    """Why the bandwidth follows the features by default: 50 unrelated tokens of 16 features, the published
    sigma.
    """
    x_ND, y_ND = (
        torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(3)).mul(2.0).requires_grad_().unbind()
    )
    absolute, relative = (
        rbf_cka(x_ND, y_ND, 0.8),
        rbf_cka(x_ND / median_distance(x_ND), y_ND / median_distance(y_ND), 0.8),
    )
    assert float(absolute) > 0.999999
    assert float(relative) < 0.6
    sizes = [
        torch.autograd.grad(value, x_ND, retain_graph=True)[0].abs().max() for value in (absolute, relative)
    ]
    assert sizes[0] < 1e-3 * sizes[1]


@pytest.mark.parametrize("name", CKAS)
@pytest.mark.parametrize(
    "make",
    {
        "no tokens": lambda: torch.zeros(0, 4),
        "one token": lambda: torch.randn(1, 4),
        "zeros": lambda: torch.zeros(9, 4),
        "constant features": lambda: torch.full((9, 4), 0.1) * torch.arange(1.0, 5.0),
        "huge constants": lambda: torch.full((9, 4), 1e15),
    }.values(),
    ids=["no tokens", "one token", "zeros", "constant features", "huge constants"],
)
def test_nothing_varies(name, make):
    x_ND = make().requires_grad_()
    y_ND = torch.randn(x_ND.size(0), 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for left, right in ((x_ND, y_ND), (y_ND, x_ND)):
        value = CKAS[name](left, right)
        assert float(value) == 0.0
        assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(value, (x_ND, y_ND)))
    assert float(median_distance(x_ND)) == 1.0


@pytest.mark.parametrize("name", CKAS)
def test_no_valid_row_and_equal_tokens_stay_finite(name):
    x_ND = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    x_ND[3:] = x_ND[0]
    x_ND.requires_grad_()
    assert float(CKAS[name](x_ND, x_ND, torch.zeros(6, dtype=torch.bool))) == 0.0
    value = CKAS[name](x_ND, x_ND.detach().flip(0))
    assert torch.isfinite(value)
    assert torch.isfinite(torch.autograd.grad(value, x_ND)[0]).all()


def test_a_small_spread_on_a_large_mean_is_seen():
    x_ND, y_ND = two_sides(30, dtype=torch.float64)
    shifted_ND = (x_ND + 100.0).float()
    expected = float(linear_cka(shifted_ND.double(), y_ND))
    assert float(linear_cka(shifted_ND, y_ND.float())) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("num_tokens", [2, 5, 8])
def test_median_distance_against_loops(num_tokens):
    x_ND, _ = two_sides(num_tokens)
    rows = x_ND.double().tolist()
    distances = [math.dist(rows[i], rows[j]) for i in range(num_tokens) for j in range(i)]
    assert float(median_distance(x_ND)) == pytest.approx(statistics.median_low(distances), rel=1e-5)
    assert not median_distance(x_ND.requires_grad_()).requires_grad


def test_median_distance_of_mostly_equal_tokens_is_their_root_mean_square():
    x_ND = torch.zeros(8, 3)
    x_ND[0, 1] = 2.0  # 7 of 28 distances are 2
    assert float(median_distance(x_ND)) == pytest.approx(math.sqrt(7 * 4 / 28))


def test_bandwidths_that_are_none_are_refused():
    for sigma in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="must be greater than 0"):
            rbf_cka(torch.zeros(3, 2), torch.zeros(3, 2), sigma)


def test_bfloat16_features_are_compared_in_float32():
    x_ND, y_ND = (side.bfloat16() for side in two_sides(20))
    for function in CKAS.values():
        assert torch.equal(function(x_ND, y_ND), function(x_ND.float(), y_ND.float()))
        assert function(x_ND, y_ND).dtype == torch.float32
