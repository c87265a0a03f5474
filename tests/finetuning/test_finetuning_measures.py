"""Measures and tests of significance against tables made by hand, plain loops, and SciPy."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from megatron_hyperrouter.errors import HyperRouterError
from megatron_hyperrouter.finetuning import session
from megatron_hyperrouter.finetuning.measures import (
    calibration_error,
    macro_f1,
    mcnemar,
    paired_bootstrap,
    scores,
)
from megatron_hyperrouter.model.loss import ClassLoss


def rights(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """A table of counts as two rows of right and wrong."""
    ours = [True] * both + [True] * first + [False] * second + [False] * neither
    theirs = [True] * both + [False] * first + [True] * second + [False] * neither
    return np.array(ours), np.array(theirs)


def test_scores_of_a_table_made_by_hand() -> None:
    # probabilities 0.9, 0.6, 0.7, 0.8 for the class that is predicted: 0, 1, 1, 0; the truth: 0, 1, 0, 1
    probs = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.8, 0.2]])
    found = scores(np.log(probs) + 5.0, np.array([0, 1, 0, 1]))
    assert found.accuracy == 0.5
    assert found.macro_f1 == pytest.approx(0.5)
    assert found.loss == pytest.approx(-(math.log(0.9) + math.log(0.6) + math.log(0.3) + math.log(0.2)) / 4)
    # each text is alone in its bin of 1/15: |1 - 0.9|, |1 - 0.6|, |0 - 0.7|, |0 - 0.8|
    assert found.ece == pytest.approx((0.1 + 0.4 + 0.7 + 0.8) / 4)


def test_macro_f1_is_the_mean_over_the_classes_that_appear() -> None:
    # the table of scikit-learn's user guide: y_true 0 1 2 0 1 2, y_pred 0 2 1 0 0 1: macro F1 0.26 (0.8 / 3)
    truth, predicted = np.array([0, 1, 2, 0, 1, 2]), np.array([0, 2, 1, 0, 0, 1])
    assert macro_f1(predicted, truth) == pytest.approx(0.8 / 3)
    assert macro_f1(np.array([7, 7]), np.array([7, 7])) == 1.0


def test_calibration_error_against_a_loop_over_bins() -> None:
    rng = np.random.default_rng(2)
    confidence = np.append(rng.uniform(0.2, 1, 500), [1.0, 1 / 15, 2 / 15])
    right = rng.uniform(size=503) < confidence**2
    expected = 0.0
    for low in range(15):
        inside = [i for i, c in enumerate(confidence) if low / 15 < c <= (low + 1) / 15]
        if inside:
            gap = np.mean([right[i] for i in inside]) - np.mean([confidence[i] for i in inside])
            expected += len(inside) / 503 * abs(gap)
    assert calibration_error(confidence, right) == pytest.approx(expected)


@pytest.mark.parametrize("first, second", [(0, 0), (5, 1), (1, 5), (12, 12), (30, 11), (700, 640)])
def test_mcnemar_is_scipy_s_binomial_test(first: int, second: int) -> None:
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(*rights(40, first, second, 9)) == pytest.approx(expected, rel=1e-9)


def test_logits_that_are_not_finite_are_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a step with a much too large learning rate."""

    def gather(everyone: list[Any], own: Any) -> None:
        everyone[0] = own

    monkeypatch.setattr(session.parallel_state, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(session.dist, "all_gather_object", gather)
    loss = ClassLoss.__new__(ClassLoss)
    logits_NC = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [0.0, math.inf]])
    engine: Any = SimpleNamespace(loss=loss, place=SimpleNamespace(world_size=1, data_rank=0))
    engine.evaluate = lambda batches, topk: loss.kept.append((logits_NC, None))
    feed: Any = SimpleNamespace(all=lambda part: (), rows_of=lambda part, rank: [0, 1, 2])
    with pytest.raises(HyperRouterError, match="the logits of 2 of 3 texts are not finite"):
        session.predictions(engine, [None] * 3, 2, feed=feed)  # type: ignore[arg-type]


def test_the_bootstrap_interval_is_that_of_resampled_texts() -> None:
    ours, theirs = rights(300, 60, 35, 105)
    low, high = paired_bootstrap(ours, theirs)
    rng = np.random.default_rng(1)
    drawn = rng.integers(0, 500, size=(4000, 500))
    differences = ours[drawn].mean(1) - theirs[drawn].mean(1)
    assert (low, high) == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=0.004)
    assert paired_bootstrap(ours, theirs) == (low, high)  # the same each time
    assert paired_bootstrap(*rights(3, 0, 0, 1)) == (0.0, 0.0)
