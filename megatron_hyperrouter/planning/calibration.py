"""Constants of a machine from measured steps: the times are sums of products, so they are a linear fit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_hyperrouter.planning.held.parameters import model_of
from megatron_hyperrouter.planning.layouts import Candidate
from megatron_hyperrouter.planning.machine import MEASURED, Machine
from megatron_hyperrouter.planning.step_time import Work, work_of

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A layout and its step time."""

    config: RunConfig
    world_size: int
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """A machine's constants, and their predictions for the steps that they were fitted to."""

    machine: Machine
    fitted: tuple[str, ...]  # the others stay as assumed
    predicted: tuple[float, ...]


def calibrate(rows: Sequence[Measured], vocab_size: int, per_node: int) -> Calibration:
    """The constants, all of them at least 0, whose predictions have the smallest relative errors."""
    machine = Machine(memory=0.0, per_node=per_node, source="measured")
    works = [work_of_row(row, vocab_size, per_node, machine.skew) for row in rows]
    seconds = np.array([row.seconds for row in rows])
    amounts = np.array(works) / seconds[:, None]
    used, costs = _smallest_errors(amounts)
    fitted = tuple(MEASURED[number] for number in used)
    values = {
        name: float(cost if name == "latency" else 1 / cost) for name, cost in zip(fitted, costs, strict=True)
    }
    machine = replace(machine, **values)  # type: ignore[arg-type]
    predicted = np.array(works)[:, used] @ costs
    return Calibration(machine, fitted, tuple(float(each) for each in predicted))


def work_of_row(row: Measured, vocab_size: int, per_node: int, skew: float) -> Work:
    """Amounts of a measured step."""
    model = model_of(row.config, vocab_size)
    return work_of(Candidate(row.config, row.world_size), model, per_node, skew)


def _smallest_errors(amounts: Array) -> tuple[list[int], Array]:
    """Least squares of ``amounts @ costs = 1`` over the sets of columns with positive costs. Each set
    includes computing. If more columns explain nothing more, the smaller set wins.
    """
    candidates = [number for number in range(1, amounts.shape[1]) if amounts[:, number].any()]
    best: tuple[float, list[int], Array] | None = None
    for size in range(len(candidates) + 1):
        for more in itertools.combinations(candidates, size):
            used = [0, *more]
            if len(used) > len(amounts):
                continue
            scale = np.abs(amounts[:, used]).max(axis=0)
            costs, _, rank, _ = np.linalg.lstsq(amounts[:, used] / scale, np.ones(len(amounts)), rcond=1e-9)
            costs = costs / scale
            if rank < len(used) or (costs <= 0).any():
                continue
            error = float(np.square(amounts[:, used] @ costs - 1).sum())
            if best is None or error < 0.99 * best[0] - 1e-12:
                best = error, used, costs
    assert best is not None, "a step has work"
    return best[1], best[2]
