"""Scores of predictions, and tests of whether two sets of predictions differ.

Legend: ``N`` texts, ``C`` classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]

_BINS = 15
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Scores:
    """The four numbers of ``results.json``."""

    accuracy: float
    macro_f1: float
    loss: float  # nats per text
    ece: float


def scores(logits_NC: Floats, classes_N: Numbers) -> Scores:
    """Of predictions by the largest logit."""
    log_probs_NC = log_softmax(logits_NC)
    predicted_N = log_probs_NC.argmax(1)
    confidence_N = np.exp(log_probs_NC.max(1))
    right_N = predicted_N == classes_N
    return Scores(
        accuracy=float(right_N.mean()),
        macro_f1=macro_f1(predicted_N, classes_N),
        loss=float(-log_probs_NC[np.arange(len(classes_N)), classes_N].mean()),
        ece=calibration_error(confidence_N, right_N),
    )


def log_softmax(logits_NC: Floats) -> Floats:
    """Logarithms of the probabilities."""
    shifted_NC = logits_NC - logits_NC.max(1, keepdims=True)
    result: Floats = shifted_NC - np.log(np.exp(shifted_NC).sum(1, keepdims=True))
    return result


def macro_f1(predicted_N: Numbers, classes_N: Numbers) -> float:
    """The mean of ``2 TP / (2 TP + FP + FN)`` over the classes that occur among labels or predictions."""
    found = []
    for one in np.union1d(predicted_N, classes_N):
        hits = int(((predicted_N == one) & (classes_N == one)).sum())
        found.append(2 * hits / int((predicted_N == one).sum() + (classes_N == one).sum()))
    return math.fsum(found) / len(found)


def calibration_error(confidence_N: Floats, right_N: NDArray[np.bool_]) -> float:
    """Expected calibration error (Guo et al., 1706.04599, equation 3) over 15 bins of equal width; a bin
    includes its upper end.
    """
    bins_N = np.clip(np.ceil(confidence_N * _BINS).astype(int) - 1, 0, _BINS - 1)
    gaps = [
        abs(float(right_N[bins_N == each].sum()) - float(confidence_N[bins_N == each].sum()))
        for each in range(_BINS)
    ]
    return math.fsum(gaps) / len(right_N)


def mcnemar(first_right_N: NDArray[np.bool_], second_right_N: NDArray[np.bool_]) -> float:
    """McNemar's exact test: the two-sided p-value from the texts that only one of the models has right."""
    only_first = int((first_right_N & ~second_right_N).sum())
    only_second = int((second_right_N & ~first_right_N).sum())
    n, fewer = only_first + only_second, min(only_first, only_second)
    below, ways = 0, 1  # ways: binomial coefficient of n and each
    for each in range(fewer + 1):
        below += ways
        ways = ways * (n - each) // (each + 1)
    return min(1.0, float(2 * below / 2**n)) if n else 1.0


def paired_bootstrap(
    first_right_N: NDArray[np.bool_], second_right_N: NDArray[np.bool_], *, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of the difference of accuracies, first less second, when the texts are resampled. A
    text counts 1, 0 or -1, so a resample is a draw of three counts.
    """
    n = len(first_right_N)
    plus = int((first_right_N & ~second_right_N).sum())
    minus = int((second_right_N & ~first_right_N).sum())
    draws_B3 = np.random.default_rng(seed).multinomial(
        n, [plus / n, minus / n, (n - plus - minus) / n], size=_RESAMPLES
    )
    low, high = np.quantile((draws_B3[:, 0] - draws_B3[:, 1]) / n, [0.025, 0.975])
    return float(low), float(high)
