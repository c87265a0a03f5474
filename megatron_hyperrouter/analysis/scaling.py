"""Scaling laws: ``L(N, D) = E + A / N^alpha + B / D^beta``, fitted to the losses of finished runs.

The fit follows Hoffmann et al. (2022, arXiv 2203.15556, approach 3): it minimises the Huber loss of the
differences between logarithms of losses, from many starting points.  Only terms whose size varies are
fitted.  The algorithm is Levenberg-Marquardt with Huber's weights, for all starting points and all
resampled sets of runs at once.

Legend: ``R`` problems that are solved together, ``n`` runs, ``t`` terms, ``p = 1 + 2 t`` parameters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

TERMS = {"N": ("A", "alpha"), "D": ("B", "beta")}  # size -> names of its coefficient and exponent
# differences of log losses beyond this count by their amount, as in the paper, and not by their square
HUBER = 1e-3
# sizes within this ratio count as equal, so that the few weights of a router are not a different size
ALIKE = 1.05
LEAST_SIZES = 3  # with two values of a size, any exponent passes through both
EXPONENTS = (math.log(1e-3), math.log(10.0))  # bounds of log alpha
DEEPEST = 20.0  # log E and log of a term stay this close to the log of the losses
NOTHING = 1e-3  # an E below this share of the smallest loss counts as 0
STEPS = 400
KEPT_STARTS = 4  # best starting points, which the fits to resampled sets use
_PATIENCE = 5  # steps without a gain after which a problem is finished


@dataclass(frozen=True)
class ScalingFit:
    """A fitted curve: ``parameters`` by name (E, A, alpha, B, beta), and intervals of them and, with both
    terms, of ``optimal_N``.
    """

    parameters: Mapping[str, float]
    runs: int
    points: int  # different sizes
    rms: float  # of the differences of log losses: about the relative error
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    level: float = 0.95
    at_bounds: tuple[
        str, ...
    ] = ()  # parameters that these runs do not identify: the fit stopped at their bounds
    resampled: tuple[Mapping[str, float], ...] = ()  # parameters of the curves that make the intervals

    def loss(self, **sizes: float) -> float:
        """The loss that the curve predicts for ``N=..., D=...``."""
        terms = [(sizes[size], *names) for size, names in TERMS.items() if names[0] in self.parameters]
        return self.parameters["E"] + math.fsum(
            self.parameters[a] * size ** -self.parameters[power] for size, a, power in terms
        )

    def optimal_exponents(self) -> dict[str, float] | None:
        """With compute C ~ N D, the best N grows as C^a and the best D as C^b: ``{"N": a, "D": b}``; None
        without both terms.
        """
        if "alpha" not in self.parameters or "beta" not in self.parameters:
            return None
        best = _optimal_n(self.parameters)
        return {"N": best, "D": 1 - best}

    def best_size(self, flops: float) -> tuple[float, float, float]:
        """The N of the lowest loss for a budget of C = 6 N D, and its interval (nan without resamples): where
        alpha A / N^alpha = beta B / D^beta, but N and D are at least 1.  Needs both terms.
        """
        best = _best_size(self.parameters, flops)
        if not self.resampled:
            return best, math.nan, math.nan
        tail = (1 - self.level) / 2
        low, high = np.quantile([_best_size(row, flops) for row in self.resampled], [tail, 1 - tail])
        return best, float(low), float(high)


def different(values: Sequence[float]) -> list[int]:
    """The class of each value, as a number. A class contains the values within a ratio of :data:`ALIKE` of
    its smallest one.
    """
    order = sorted(set(values))
    classes: dict[float, int] = {}
    first, number = -math.inf, -1
    for value in order:
        if value > first * ALIKE or number < 0:
            first, number = value, number + 1
        classes[value] = number
    return [classes[value] for value in values]


def varying(sizes: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """The sizes that differ between runs; only for these can a curve have a term."""
    return {name: values for name, values in sizes.items() if max(different(values)) > 0}


def different_points(sizes: Mapping[str, Sequence[float]]) -> int:
    """Number of different pairs (N, D) among the runs."""
    return len(set(zip(*map(different, sizes.values()), strict=True)))


def obstacle(sizes: Mapping[str, Sequence[float]]) -> str:
    """Why no curve can be fitted over ``sizes`` (N and D of each run); empty if one can be fitted."""
    terms = varying(sizes)
    if not terms:
        return f"{' and '.join(sizes)} are the same in all runs"
    points, needed = different_points(sizes), 2 + 2 * len(terms)
    curve = " + ".join(["E", *(f"{TERMS[size][0]}/{size}^{TERMS[size][1]}" for size in terms)])
    if points < needed:
        return f"{curve} needs runs of at least {needed} different sizes, but there are {points}"
    for size, values in terms.items():
        if (found := 1 + max(different(values))) < LEAST_SIZES:
            return f"{curve} needs {LEAST_SIZES} different values of {size}, but there are {found}"
    return ""


def fit(
    sizes: Mapping[str, Sequence[float]],
    losses: Sequence[float],
    *,
    resamples: int = 0,
    seed: int = 0,
    level: float = 0.95,
) -> ScalingFit:
    """The curve through the losses of runs with ``sizes`` (N, D or both); raises ValueError with the
    :func:`obstacle`.

    ``resamples``: number of sets of residuals that are drawn with replacement.  A curve is fitted to each
    set, and the intervals contain the middle ``level`` of the fitted parameters.  Residuals are multiplied
    by sqrt(n / (n - p)), because the fit itself makes them smaller.
    """
    if reason := obstacle(sizes):
        raise ValueError(reason)
    if not all(math.isfinite(loss) and loss > 0 for loss in losses):
        raise ValueError("losses must be finite and greater than 0")
    terms = list(varying(sizes))
    logs_tn = np.log(np.array([sizes[size] for size in terms], dtype=np.float64))
    centre_t = logs_tn.mean(axis=1)
    logs_tn = logs_tn - centre_t[:, None]
    y_n = np.log(np.array(losses, dtype=np.float64))
    starts_Rp = _starts(logs_tn, y_n)
    found_Rp, value_R = _minimise(starts_Rp, logs_tn, np.broadcast_to(y_n, (len(starts_Rp), y_n.size)))
    order = np.argsort(value_R, kind="stable")
    best_p = found_Rp[order[0]]
    residual_n = y_n - _predicted(best_p[None], logs_tn)[0][0]
    intervals: dict[str, tuple[float, float]] = {}
    rows: list[dict[str, float]] = []
    if resamples:
        drawn = _resampled(
            found_Rp[order[:KEPT_STARTS]], logs_tn, y_n, residual_n, resamples=resamples, seed=seed
        )
        rows = [_named(row, terms, centre_t) for row in drawn]
        if len(terms) == 2:
            rows = [row | {"optimal_N": _optimal_n(row)} for row in rows]
        tail = (1 - level) / 2
        for name in rows[0]:
            low, high = np.quantile([row[name] for row in rows], [tail, 1 - tail])
            intervals[name] = (float(low), float(high))
    rms = float(np.sqrt(np.mean(residual_n**2)))
    named = _named(best_p, terms, centre_t)
    return ScalingFit(
        named,
        y_n.size,
        different_points(sizes),
        rms,
        intervals,
        level,
        _at_bounds(named, min(losses)),
        tuple(rows),
    )


def objective(curve: ScalingFit, sizes: Mapping[str, Sequence[float]], losses: Sequence[float]) -> float:
    """What the fit minimises: the sum of the Huber losses of the differences between log losses."""
    rows = (dict(zip(sizes, row, strict=True)) for row in zip(*sizes.values(), strict=True))
    return float(
        _huber(
            np.array(
                [math.log(curve.loss(**row)) - math.log(loss) for row, loss in zip(rows, losses, strict=True)]
            )
        )
    )


# ---------------------------------------------------------------------------------------- minimiser
def _starts(logs_tn: Array, y_n: Array) -> Array:
    """A grid of exponents and of shares of the smallest loss for E; the coefficients of each by linear
    least squares.
    """
    losses_n = np.exp(y_n)
    rows = []
    exponents = (0.03, 0.1, 0.25, 0.5, 1.0, 2.0) if len(logs_tn) == 1 else (0.05, 0.2, 0.5, 1.2)
    for share in (0.01, 0.3, 0.6, 0.85, 0.97):
        for powers in itertools.product(exponents, repeat=len(logs_tn)):
            basis_nt = np.exp(-np.array(powers)[:, None] * logs_tn).T
            irreducible = share * losses_n.min()
            coefficients = np.linalg.lstsq(basis_nt, losses_n - irreducible, rcond=None)[0]
            logs = np.log(np.maximum(coefficients, 1e-3 * losses_n.mean()))
            rows.append([math.log(irreducible), *np.stack([logs, np.log(powers)], axis=1).ravel()])
    return np.array(rows)


def _predicted(theta_Rp: Array, logs_tn: Array) -> tuple[Array, Array]:
    """Log losses ``_Rn`` of the curves, and their derivatives ``_Rnp``."""
    powers_Rt = np.exp(theta_Rp[:, 2::2])
    slopes_Rtn = -powers_Rt[:, :, None] * logs_tn
    parts_Rtn = np.exp(theta_Rp[:, 1::2, None] + slopes_Rtn)
    irreducible_R = np.exp(theta_Rp[:, :1])
    whole_Rn = irreducible_R + parts_Rtn.sum(axis=1)
    jacobian_Rnp = np.empty((*whole_Rn.shape, theta_Rp.shape[1]))
    jacobian_Rnp[..., 0] = irreducible_R / whole_Rn
    jacobian_Rnp[..., 1::2] = (parts_Rtn / whole_Rn[:, None]).transpose(0, 2, 1)
    jacobian_Rnp[..., 2::2] = (slopes_Rtn * parts_Rtn / whole_Rn[:, None]).transpose(0, 2, 1)
    return np.log(whole_Rn), jacobian_Rnp


def _huber(residual: Array) -> Array:
    size = np.abs(residual)
    whole: Array = np.where(size <= HUBER, 0.5 * residual**2, HUBER * (size - 0.5 * HUBER)).sum(axis=-1)
    return whole


def _minimise(theta_Rp: Array, logs_tn: Array, y_Rn: Array) -> tuple[Array, Array]:
    """The minimum of the Huber loss that is reached from each start, and its value; each step solves least
    squares with Huber's weights.
    """
    low_p, high_p = _bounds(y_Rn, theta_Rp.shape[1])
    done_Rp = np.clip(theta_Rp, low_p, high_p)
    done_R = _huber(_predicted(done_Rp, logs_tn)[0] - y_Rn)
    left = np.arange(len(done_Rp))  # problems that still move
    damping_R, idle_R = np.full(len(left), 1e-2), np.zeros(len(left), dtype=np.int64)
    for _ in range(STEPS):
        theta_Rp, y = done_Rp[left], y_Rn[left]
        log_Rn, jacobian_Rnp = _predicted(theta_Rp, logs_tn)
        residual_Rn = log_Rn - y
        weight_Rn = HUBER / np.maximum(np.abs(residual_Rn), HUBER)
        weighted_Rnp = jacobian_Rnp * weight_Rn[..., None]
        normal_Rpp = weighted_Rnp.transpose(0, 2, 1) @ jacobian_Rnp
        gradient_Rp = (weighted_Rnp * residual_Rn[..., None]).sum(axis=1)
        diagonal_Rp = np.einsum("rpp->rp", normal_Rpp)
        ridge_Rp = (
            damping_R[left, None] * diagonal_Rp + 1e-12 * diagonal_Rp.max(axis=1, keepdims=True) + 1e-300
        )
        move_Rp = np.linalg.solve(
            normal_Rpp + ridge_Rp[..., None] * np.eye(theta_Rp.shape[1]), -gradient_Rp[..., None]
        )[..., 0]
        tried_Rp = np.clip(theta_Rp + np.clip(move_Rp, -2.0, 2.0), low_p, high_p)
        value_R = _huber(_predicted(tried_Rp, logs_tn)[0] - y)
        better = value_R < done_R[left]
        gained = value_R < done_R[left] * (1 - 1e-9)
        done_Rp[left[better]], done_R[left[better]] = tried_Rp[better], value_R[better]
        damping_R[left] = np.clip(np.where(better, damping_R[left] / 5, damping_R[left] * 4), 1e-12, 1e12)
        idle_R[left] = np.where(gained, 0, idle_R[left] + 1)
        left = left[idle_R[left] < _PATIENCE]
        if not left.size:
            break
    return done_Rp, done_R


def _bounds(y_Rn: Array, p: int) -> tuple[Array, Array]:
    low_p, high_p = np.full(p, float(y_Rn.min()) - DEEPEST), np.full(p, float(y_Rn.max()) + DEEPEST)
    low_p[2::2], high_p[2::2] = EXPONENTS
    high_p[0] = float(y_Rn.max())
    return low_p, high_p


def _resampled(
    starts_kp: Array, logs_tn: Array, y_n: Array, residual_n: Array, *, resamples: int, seed: int
) -> Array:
    """Parameters fitted to the curve plus residuals of other runs: ``[resamples, p]``."""
    draw = np.random.default_rng(seed)
    inflated_n = (residual_n - residual_n.mean()) * math.sqrt(y_n.size / (y_n.size - starts_kp.shape[1]))
    y_Rn = (y_n - residual_n) + draw.choice(inflated_n, size=(resamples, y_n.size))
    found, value = zip(
        *(_minimise(np.tile(start_p, (resamples, 1)), logs_tn, y_Rn) for start_p in starts_kp), strict=True
    )
    best_R = np.argmin(np.stack(value), axis=0)
    picked: Array = np.stack(found)[best_R, np.arange(resamples)]
    return picked


def _optimal_n(parameters: Mapping[str, float]) -> float:
    return parameters["beta"] / (parameters["alpha"] + parameters["beta"])


def _best_size(row: Mapping[str, float], flops: float) -> float:
    alpha, beta = row["alpha"], row["beta"]
    log_ratio = math.log(alpha * row["A"]) - math.log(beta * row["B"])
    log_most = math.log(flops / 6)  # with D = 1
    best = (log_ratio + beta * log_most) / (alpha + beta)
    return math.exp(max(min(best, log_most), 0.0))  # small exponents would give less than 1


def _at_bounds(named: Mapping[str, float], least_loss: float) -> tuple[str, ...]:
    low, high = (math.exp(bound) for bound in EXPONENTS)
    powers = [
        name for _, name in TERMS.values() if name in named and not low * 1.01 < named[name] < high * 0.99
    ]
    return (*(["E"] if named["E"] < NOTHING * least_loss else []), *powers)


def _named(theta_p: Array, terms: Sequence[str], centre_t: Array) -> dict[str, float]:
    named = {"E": math.exp(theta_p[0])}
    for number, size in enumerate(terms):
        coefficient, power = TERMS[size]
        named[power] = math.exp(theta_p[2 + 2 * number])
        named[coefficient] = math.exp(theta_p[1 + 2 * number] + named[power] * float(centre_t[number]))
    return {
        name: named[name] for name in ("E", *itertools.chain.from_iterable(TERMS.values())) if name in named
    }
