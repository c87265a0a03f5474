"""Mean and confidence interval of a few runs."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_and_half(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None]:
    """The mean, and half the width of Student's interval around it; None for a single value, which shows no
    spread.

    The interval contains the mean of all possible runs in ``level`` of the cases, if runs are independent and
    normally distributed.
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, t_quantile(0.5 + level / 2, n - 1) * math.sqrt(variance / n)


def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution with ``degrees`` degrees of freedom; ``probability`` must be
    at least 1/2 and below 1.
    """
    if not (0.5 <= probability < 1.0 and degrees >= 1):
        raise ValueError(
            "probability must be at least 0.5 and less than 1, and degrees must be at least 1; got "
            f"probability = {probability} and degrees = {degrees}"
        )
    low, high = 0.0, 1.0
    while t_below(high, degrees) < probability:
        low, high = high, 2 * high
    for _ in range(100):  # halves the interval down to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if t_below(middle, degrees) < probability else (low, middle)
    return high


def t_below(t: float, degrees: int) -> float:
    """Probability that Student's t is below ``t`` >= 0: the finite sums of Abramowitz and Stegun, 26.7.3 and
    26.7.4.
    """
    angle = math.atan2(t, math.sqrt(degrees))
    squared_cosine = math.cos(angle) ** 2
    odd = degrees % 2
    term = math.sin(angle) * (math.cos(angle) if odd else 1.0)
    total = 0.0
    for number in range(1 + odd, degrees, 2):
        total += term
        term *= squared_cosine * number / (number + 1)
    inside = 2 / math.pi * (angle + total) if odd else total
    return 0.5 + inside / 2
