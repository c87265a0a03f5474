"""What a few paired runs can show: the paired t-test, Holm's correction, and how many runs are needed.

Runs are paired by seed.  ``sd``: standard deviation of the differences over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_hyperrouter.analysis.intervals import mean_and_half, t_below, t_quantile

ALPHA, POWER = 0.05, 0.8
MOST_RUNS = 1000


@dataclass(frozen=True)
class PairedTest:
    """The two-sided paired t-test of some differences; a single difference has only a mean."""

    runs: int
    mean: float
    half: float | None = None  # of the 95 % interval
    sd: float | None = None
    p: float | None = None


def paired_test(differences: Sequence[float]) -> PairedTest:
    """Test whether the mean difference is 0."""
    runs = len(differences)
    mean, half = mean_and_half(differences)
    if runs < 2:
        return PairedTest(runs, mean)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in differences) / (runs - 1))
    if sd == 0.0:
        return PairedTest(runs, mean, half, sd, 1.0 if mean == 0.0 else 0.0)
    t = abs(mean) / (sd / math.sqrt(runs))
    return PairedTest(runs, mean, half, sd, max(2 * (1 - t_below(t, runs - 1)), 0.0))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order.  If every comparison with a value below alpha is
    accepted, the probability that any of them is wrong stays below alpha.
    """
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min((len(p_values) - rank) * p_values[at], 1.0))
        adjusted[at] = largest
    return adjusted


def smallest_effect(sd: float, runs: int, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """The mean difference that the test would find with this ``power``: the usual approximation by two
    quantiles of Student's t.
    """
    return _quantiles(runs, alpha, power) * sd / math.sqrt(runs)


def runs_needed(sd: float, effect: float, *, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """The fewest seeds with which the test would find ``effect``; None beyond :data:`MOST_RUNS`."""
    for runs in range(2, MOST_RUNS + 1):
        if smallest_effect(sd, runs, alpha=alpha, power=power) <= effect:
            return runs
    return None


def sd_upper(sd: float, runs: int) -> float:
    """The one-sided 80 % upper bound of a standard deviation that was estimated from ``runs`` differences.
    A few runs estimate it badly, so plan with this bound (Wilson and Hilferty's approximation of
    chi-square).
    """
    degrees = runs - 1
    chi_square = degrees * (1 - 2 / (9 * degrees) - 0.8416212 * math.sqrt(2 / (9 * degrees))) ** 3
    return sd * math.sqrt(degrees / chi_square)


def _quantiles(runs: int, alpha: float, power: float) -> float:
    return t_quantile(1 - alpha / 2, runs - 1) + t_quantile(power, runs - 1)
