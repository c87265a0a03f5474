"""Student's intervals against printed tables, a numerical integral, and the coverage of made-up runs."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import scipy.stats

from megatron_hyperrouter.analysis.intervals import mean_and_half, t_below, t_quantile

TABLE = {
    1: 12.7062,
    2: 4.3027,
    3: 3.1824,
    4: 2.7764,
    5: 2.5706,
    9: 2.2622,
    10: 2.2281,
    29: 2.0452,
    30: 2.0423,
    120: 1.9799,
}


@pytest.mark.parametrize("degrees", TABLE)
def test_printed_table_of_the_95_percent_interval(degrees):
    assert t_quantile(0.975, degrees) == pytest.approx(TABLE[degrees], abs=5.1e-5)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 8, 25])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.7, 6.0])
def test_probability_against_simpsons_rule(degrees, t):
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    n, total = 4000, 0.0
    for i in range(n + 1):
        weight = 1 if i in (0, n) else 4 if i % 2 else 2
        total += weight * scale * (1 + (t * i / n) ** 2 / degrees) ** (-(degrees + 1) / 2)
    assert t_below(t, degrees) == pytest.approx(0.5 + total * t / n / 3, abs=1e-9)


@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 30, 200])
@pytest.mark.parametrize("probability", [0.55, 0.9, 0.975, 0.9995])
def test_quantiles_are_scipys(degrees, probability):
    assert t_quantile(probability, degrees) == pytest.approx(
        scipy.stats.t.ppf(probability, degrees), rel=1e-9
    )


def test_interval_of_three_runs_by_hand():
    mean, half = mean_and_half([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.302653 * statistics.stdev([1.0, 2.0, 4.0]) / math.sqrt(3), rel=1e-6)


def test_one_run_has_no_interval_and_equal_runs_have_one_of_nothing():
    assert mean_and_half([2.5]) == (2.5, None)
    assert mean_and_half([2.5, 2.5, 2.5]) == (2.5, 0.0)


def test_19_of_20_intervals_hold_the_mean():
    draw = random.Random(5)
    held = 0
    for _ in range(4000):
        mean, half = mean_and_half([draw.gauss(3.0, 2.0) for _ in range(3)])
        assert half is not None
        held += abs(mean - 3.0) <= half
    assert held / 4000 == pytest.approx(0.95, abs=0.012)


def test_arguments_out_of_range():
    for probability, degrees in ((0.4, 3), (1.0, 3), (0.9, 0)):
        with pytest.raises(ValueError, match="must be at least"):
            t_quantile(probability, degrees)
