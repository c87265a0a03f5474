"""Ranks that delay all others in every step, because their data are late or because they compute slowly."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_hyperrouter.engines.base import StepResult

_STEPS = 20  # after which a rank is named
_PAUSE = 500  # steps until the next report of the same kind
_WAIT = 0.1  # share of the time of these steps that the data of a rank may cost the others
_SLOW = 1.1  # times the median time for the same work that a rank may take


@dataclass(frozen=True)
class Rule:
    """When a rank is late."""

    alarm: str
    threshold: float
    of: Callable[[StepResult], Sequence[float]]  # what a step shows of each rank
    # From these of several steps, and the seconds of all of them: the rank, and a value above the threshold.
    judge: Callable[[Sequence[Sequence[float]], float], tuple[int, float] | None]
    words: str  # about a rank, with its value and the steps
    remedy: str


def late_data(waits_SR: Sequence[Sequence[float]], seconds: float) -> tuple[int, float] | None:
    """The rank that waited longest for its data, and the share of the time that this cost the others."""
    waits_R = [sum(waits_S) for waits_S in zip(*waits_SR, strict=True)]
    rank = max(range(len(waits_R)), key=waits_R.__getitem__)
    share = (waits_R[rank] - median_low(waits_R)) / max(seconds, 1e-9)
    return (rank, share) if share > _WAIT else None


def over_median(times_R: Sequence[float]) -> list[float]:
    """The times as multiples of the median of those that are known."""
    middle = median_low([time for time in times_R if time] or [1.0])
    return [time / middle for time in times_R]


def slow_rank(ratios_SR: Sequence[Sequence[float]], _seconds: float) -> tuple[int, float] | None:
    """The slowest of the ranks that took more than ``_SLOW`` times the median in each step, and its mean
    ratio.  A rank that is only disturbed now and then is not slower in each of so many steps.
    """
    by_rank = enumerate(zip(*ratios_SR, strict=True))
    found = [(sum(ratios_S), rank) for rank, ratios_S in by_rank if min(ratios_S) > _SLOW]
    total, rank = max(found, default=(0.0, 0))
    return (rank, total / len(ratios_SR)) if found else None


RULES = (
    Rule(
        "late_data",
        _WAIT,
        lambda result: result.data_waits,
        late_data,
        "all ranks waited for its data, for {value:.0%} of the time of steps {since} to {step}",
        "use more --num-workers, or check the disk of its machine",
    ),
    Rule(
        "slow_rank",
        _SLOW,
        lambda result: over_median(result.compute_times),
        slow_rank,
        "all ranks waited for it: in steps {since} to {step}, it took {value:.2f} times as long as the "
        "median rank for the same work",
        "look for slow clocks, heat and other processes on its machine, for example with mhr doctor",
    ),
)


@dataclass(frozen=True)
class LateRank:
    """A rank that delays all others."""

    rule: Rule
    rank: int
    value: float
    since: int  # the first step of those that were judged


@dataclass
class LateRanks:
    """Applies each rule to the last steps.  Every rank finds the same, because it has the same numbers."""

    _told: dict[str, deque[Sequence[float]]] = field(
        default_factory=lambda: {rule.alarm: deque(maxlen=_STEPS) for rule in RULES}
    )
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_STEPS))
    _quiet_until: dict[str, int] = field(default_factory=dict)

    def see(self, step: int, result: StepResult) -> list[LateRank]:
        """The ranks that step ``step``, counted from 1, has shown to be late."""
        if not result.seconds:  # the first step: kernels are compiled and caches filled in it
            return []
        self._seconds.append(result.seconds)
        found = []
        for rule in RULES:
            told = self._told[rule.alarm]
            told.append(rule.of(result))
            if len(told) < _STEPS or len(told[-1]) < 2 or step < self._quiet_until.get(rule.alarm, 0):
                continue
            if late := rule.judge(told, sum(self._seconds)):
                self._quiet_until[rule.alarm] = step + _PAUSE
                found.append(LateRank(rule, *late, step - _STEPS + 1))
        return found
