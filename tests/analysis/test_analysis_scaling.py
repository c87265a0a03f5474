"""Scaling laws: fits recover known constants, and with noise their intervals contain them; the minimum
against another minimiser; what is refused.
"""

from __future__ import annotations

import itertools
import math
import random
import re

import numpy as np
import pytest
import torch

from megatron_hyperrouter.analysis import scaling
from megatron_hyperrouter.analysis.scaling import HUBER, ScalingFit, fit, objective, obstacle
from megatron_hyperrouter.studies.conclusions.optimal import optimal_text

TRUE = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}  # Hoffmann et al.
NS, DS = (1e7, 3e7, 1e8, 3e8, 1e9), (2e8, 1e9, 5e9, 2e10)


def true_loss(n: float, d: float | None) -> float:
    return (
        TRUE["E"] + TRUE["A"] * n ** -TRUE["alpha"] + (0.0 if d is None else TRUE["B"] * d ** -TRUE["beta"])
    )


def study(
    *, over_d: bool, noise: float = 0.0, seeds: int = 1, seed: int = 0
) -> tuple[dict[str, list[float]], list[float]]:
    draw = random.Random(seed)
    pairs = [pair for pair in itertools.product(NS, DS if over_d else [1e9]) for _ in range(seeds)]
    losses = [true_loss(n, d if over_d else None) * math.exp(draw.gauss(0.0, noise)) for n, d in pairs]
    return {"N": [n for n, _ in pairs], "D": [d for _, d in pairs]}, losses


@pytest.mark.parametrize("over_d", [False, True])
def test_exact_losses_give_the_constants_back(over_d):
    sizes, losses = study(over_d=over_d)
    found = fit(sizes, losses)
    expected = TRUE if over_d else {name: TRUE[name] for name in ("E", "A", "alpha")}
    assert found.parameters == pytest.approx(expected, rel=1e-6)
    assert found.rms < 1e-9
    assert (found.runs, found.points) == (len(losses), len(losses))
    extrapolated = {"N": 1e11, "D": 1e12} if over_d else {"N": 1e11}
    assert found.loss(**extrapolated) == pytest.approx(true_loss(1e11, 1e12 if over_d else None), rel=1e-7)


def test_only_d_varies():
    losses = [1.5 + 30.0 * d**-0.2 for d in DS]
    found = fit({"N": [5e6] * 4, "D": list(DS)}, losses)
    assert found.parameters == pytest.approx({"E": 1.5, "B": 30.0, "beta": 0.2}, rel=1e-5)
    assert found.optimal_exponents() is None


def test_best_sizes_for_a_budget_against_a_search():
    sizes, losses = study(over_d=True)
    exponents = fit(sizes, losses).optimal_exponents()
    assert exponents is not None

    def best(compute: float) -> float:
        grid = [10 ** (4 + at / 500) for at in range(8000)]
        return min(grid, key=lambda n: true_loss(n, compute / n))

    slope = math.log(best(1e24) / best(1e18)) / math.log(1e6)
    assert exponents["N"] == pytest.approx(slope, abs=0.002)
    assert exponents["N"] + exponents["D"] == pytest.approx(1.0)


@pytest.mark.parametrize("over_d", [False, True])
def test_the_minimum_is_that_of_lbfgs(over_d):
    """torch's L-BFGS on the same objective, started at the fit and elsewhere, finds no lower value."""
    sizes, losses = study(over_d=over_d, noise=0.01, seeds=2, seed=3)
    found = fit(sizes, losses)
    logs = {name: torch.tensor(values, dtype=torch.float64).log() for name, values in sizes.items()}
    y = torch.tensor(losses, dtype=torch.float64).log()

    def lbfgs(start: dict[str, float]) -> float:
        theta = {
            name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
            for name, value in start.items()
        }
        optimizer = torch.optim.LBFGS(
            theta.values(), max_iter=2000, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
        )

        def value() -> torch.Tensor:
            terms = [theta["E"].expand_as(y), theta["A"] - theta["alpha"] * logs["N"]]
            terms += [theta["B"] - theta["beta"] * logs["D"]] if over_d else []
            return torch.nn.functional.huber_loss(
                torch.stack(terms).logsumexp(0), y, reduction="sum", delta=HUBER
            )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = value()
            loss.backward()
            return loss

        optimizer.step(closure)
        return value().item()

    def logs_of(parameters: dict[str, float]) -> dict[str, float]:
        return {
            name: value if name in ("alpha", "beta") else math.log(value)
            for name, value in parameters.items()
        }

    own = objective(found, sizes, losses)
    assert own <= lbfgs(logs_of(dict(found.parameters))) * (1 + 1e-6)
    for moved in (0.8, 1.3):
        assert own <= lbfgs(
            logs_of({name: value * moved for name, value in TRUE.items() if name in found.parameters})
        ) * (1 + 1e-6)


def test_one_run_that_went_wrong_moves_least_squares_more_than_ten_times_as_far(monkeypatch):
    sizes, losses = study(over_d=False, seeds=3)
    losses[4] *= 1.3
    robust = fit(sizes, losses).parameters["alpha"]
    monkeypatch.setattr(scaling, "HUBER", 10.0)
    squares = fit(sizes, losses).parameters["alpha"]
    assert 10 * abs(robust - TRUE["alpha"]) < abs(squares - TRUE["alpha"])


def test_intervals_hold_the_constants_and_grow_with_the_noise():
    """Of 30 made-up studies, 95 % intervals hold alpha in at least 24: fewer has a chance below 1e-3 if they
    are what they say.
    """
    held, widths = 0, []
    for seed in range(30):
        sizes, losses = study(over_d=False, noise=0.003, seeds=3, seed=seed)
        found = fit(sizes, losses, resamples=100, seed=seed)
        low, high = found.intervals["alpha"]
        held += low <= TRUE["alpha"] <= high
        widths.append(high - low)
    assert held >= 24
    sizes, losses = study(over_d=False, noise=0.012, seeds=3)
    low, high = fit(sizes, losses, resamples=100).intervals["alpha"]
    assert high - low > 2 * sum(widths) / len(widths)


def test_the_noisy_curve_of_the_paper_has_all_constants_in_its_intervals():
    sizes, losses = study(over_d=True, noise=0.002, seeds=2, seed=1)
    found = fit(sizes, losses, resamples=200)
    for name, value in TRUE.items():
        low, high = found.intervals[name]
        assert low < value < high, name
        assert low < found.parameters[name] < high, name


def test_the_interval_of_the_best_size_holds_it_and_is_narrower_than_its_parts_allow():
    """alpha and beta move together in the resampled fits; their ratio has an interval of its own."""
    sizes, losses = study(over_d=True, noise=0.002, seeds=2, seed=1)
    found = fit(sizes, losses, resamples=200)
    low, high = found.intervals["optimal_N"]
    assert low < TRUE["beta"] / (TRUE["alpha"] + TRUE["beta"]) < high
    (a0, a1), (b0, b1) = found.intervals["alpha"], found.intervals["beta"]
    assert b0 / (a1 + b0) < low < high < b1 / (a0 + b1)
    assert "optimal_N" not in fit(*study(over_d=False), resamples=10).intervals


def test_what_the_runs_do_not_tell_is_said():
    plain = [1e5, 1e6, 1e7, 1e8]
    assert fit({"N": plain}, [50.0 * n**-0.2 for n in plain]).at_bounds == ("E",)  # a pure power law
    assert fit({"N": plain}, [0.5 + 50.0 * n**-0.2 for n in plain]).at_bounds == ()
    # all the fall before the second size
    assert fit({"N": [1e5, 1.2e5, 1.5e5, 1.8e5]}, [9.0, 2.0, 2.0, 2.0]).at_bounds == ("alpha",)
    assert fit(*study(over_d=True)).at_bounds == ()


def test_the_same_study_has_the_same_intervals():
    sizes, losses = study(over_d=False, noise=0.01)
    assert fit(sizes, losses, resamples=50) == fit(sizes, losses, resamples=50)
    assert fit(sizes, losses, resamples=50).intervals != fit(sizes, losses, resamples=50, seed=1).intervals


REFUSED = {
    "one point": ([1e6] * 5, [1e9] * 5, "N and D are the same"),
    "three models": (
        [1e6, 1e7, 1e8],
        [1e9] * 3,
        "needs runs of at least 4 different sizes, but there are 3",
    ),
    "seeds are no sizes": ([1e6, 1e7, 1e8] * 3, [1e9] * 9, "there are 3"),
    "sizes that hardly differ": ([1e6, 1.02e6, 1e7, 1.01e7], [1e9] * 4, "there are 2"),
    "two by two": (
        [1e6, 1e6, 1e7, 1e7],
        [1e9, 1e10] * 2,
        "needs runs of at least 6 different sizes, but there are 4",
    ),
    "two lengths": (
        [1e6, 1e6, 1e7, 1e7, 1e8, 1e8],
        [1e9, 1e10] * 3,
        ("needs 3 different values of D, but there are 2"),
    ),
}


@pytest.mark.parametrize(("n", "d", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_fitted(n, d, says):
    assert says in obstacle({"N": n, "D": d})
    with pytest.raises(ValueError, match=re.escape(says)):
        fit({"N": n, "D": d}, [2.0] * len(n))


def test_losses_that_are_none():
    for bad in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="losses must be finite and greater than 0"):
            fit({"N": [1e5, 1e6, 1e7, 1e8], "D": [1.0] * 4}, [3.0, 2.5, bad, 2.0])


def test_small_exponents_lead_no_further_than_one_parameter_or_one_token():
    flat = {"E": 2.0, "A": 1e-8, "alpha": 1e-3, "B": 1.0, "beta": 1e-3}
    steep = {"E": 2.0, "A": 1.0, "alpha": 1e-3, "B": 1e-8, "beta": 1e-3}
    for parameters, best, shown in ((flat, 1.0, "| 1 ["), (steep, 1e18, "| 1e+18 [")):
        found = ScalingFit(parameters, 9, 9, 0.0, resampled=(flat, steep))
        middle, low, high = found.best_size(6e18)
        assert middle == pytest.approx(best) and 1.0 < low < high < 1e18
        assert shown in optimal_text([("all runs", found)], 6e18, "active")


def test_best_size_is_the_lowest_point_of_a_grid():
    sizes = [(n, d) for n in (1e6, 4e6, 16e6, 64e6) for d in (1e8, 4e8, 16e8)]
    truth = {"E": 1.7, "A": 400.0, "alpha": 0.34, "B": 410.0, "beta": 0.28}
    losses = [truth["E"] + truth["A"] / n**0.34 + truth["B"] / d**0.28 for n, d in sizes]
    noisy = [loss * (1 + 2e-3 * (-1) ** number) for number, loss in enumerate(losses)]
    found = fit({"N": [n for n, _ in sizes], "D": [d for _, d in sizes]}, noisy, resamples=50)
    budget = 1e19
    grid = np.geomspace(1e6, 1e11, 4001)
    lowest = grid[np.argmin([found.loss(N=n, D=budget / 6 / n) for n in grid])]
    best, low, high = found.best_size(budget)
    assert best == pytest.approx(lowest, rel=5e-3)
    assert low < best < high
