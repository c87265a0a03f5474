"""Paired tests, Holm's correction and power against SciPy and tables made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from megatron_hyperrouter.analysis.power import (
    holm,
    paired_test,
    runs_needed,
    sd_upper,
    smallest_effect,
)


@pytest.mark.parametrize("runs", [2, 3, 8, 25])
@pytest.mark.parametrize("shift", [0.0, 0.3, 5.0])
def test_paired_test_against_scipy(runs: int, shift: float) -> None:
    values = np.random.default_rng(runs).normal(shift, 1.0, runs)
    found, expected = paired_test(list(values)), stats.ttest_1samp(values, 0.0)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    low, high = expected.confidence_interval(0.95)
    assert (found.mean, found.half) == pytest.approx(((low + high) / 2, (high - low) / 2))
    assert found.sd == pytest.approx(values.std(ddof=1))


def test_edges_of_the_paired_test() -> None:
    assert paired_test([0.5]).p is None
    assert paired_test([0.0, 0.0]).p == 1.0
    assert paired_test([0.5, 0.5]).p == 0.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def power(effect: float, sd: float, runs: int) -> float:
    """Power of the two-sided paired t-test at 5 %, from the noncentral t distribution."""
    limit, shift = stats.t.ppf(0.975, runs - 1), effect / sd * math.sqrt(runs)
    return float(stats.nct.sf(limit, runs - 1, shift) + stats.nct.cdf(-limit, runs - 1, shift))


@pytest.mark.parametrize("runs", [4, 5, 8, 12, 40])
def test_smallest_effect_has_the_power_that_it_claims(runs: int) -> None:
    assert power(smallest_effect(0.07, runs), 0.07, runs) == pytest.approx(0.8, abs=0.025)


@pytest.mark.parametrize(("sd", "effect"), [(0.071, 0.15), (0.071, 0.05), (0.035, 0.02), (0.008, 0.02)])
def test_runs_needed(sd: float, effect: float) -> None:
    needed = runs_needed(sd, effect)
    exact = next(runs for runs in range(2, 500) if power(effect, sd, runs) >= 0.8)
    assert needed is not None and abs(needed - exact) <= 1


def test_more_runs_than_anybody_makes() -> None:
    assert runs_needed(1.0, 1e-3) is None


@pytest.mark.parametrize("runs", [3, 5, 8, 20])
def test_upper_bound_of_a_spread(runs: int) -> None:
    exact = math.sqrt((runs - 1) / stats.chi2.ppf(0.2, runs - 1))
    assert sd_upper(1.0, runs) == pytest.approx(exact, rel=0.02)
