"""Ranks that delay all others in every step, because their data are late or because they compute slowly."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median_low
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_hyperrouter.engines.base import StepResult

_STEPS = 20  # after which a rank is named
_PAUSE = 500  # steps until the next report of the same kind
REPORT_HOLDS = _PAUSE + _STEPS  # steps after which a rank that is still late has been named again
_WAIT = 0.1  # share of the time of these steps that the data of a rank may cost the others
_SLOW = 1.1  # times the median time for the same work that a rank may take


@dataclass(frozen=True)
class Rule:
    """When a rank is late."""

    alarm: str
    threshold: float
    of: Callable[[StepResult], Sequence[float]]  # what a step shows of each rank
    # From these of several steps, and the seconds of all of them: what is above the threshold, and its rank.
    judge: Callable[[Sequence[Sequence[float]], float], list[tuple[float, int]]]
    words: str  # about a rank, with its value and the steps
    remedy: str


def late_data(waits_SR: Sequence[Sequence[float]], seconds: float) -> list[tuple[float, int]]:
    """The ranks that waited long for their data, each with the share of the time that it cost the others."""
    waits_R = [sum(waits_S) for waits_S in zip(*waits_SR, strict=True)]
    usual = median_low(waits_R)
    shares_R = [(waited - usual) / max(seconds, 1e-9) for waited in waits_R]
    return [(share, rank) for rank, share in enumerate(shares_R) if share > _WAIT]


def over_median(times_R: Sequence[float]) -> list[float]:
    """The times as multiples of the median of those that are known."""
    middle = median_low([time for time in times_R if time] or [1.0])
    return [time / middle for time in times_R]


def slow_rank(ratios_SR: Sequence[Sequence[float]], _seconds: float) -> list[tuple[float, int]]:
    """The ranks that took more than ``_SLOW`` times the median in each step, each with its mean ratio.

    A rank that is only disturbed now and then is not slower in each of so many steps.
    """
    by_rank = enumerate(zip(*ratios_SR, strict=True))
    return [(fmean(ratios_S), rank) for rank, ratios_S in by_rank if min(ratios_S) > _SLOW]


RULES = (
    Rule(
        "late_data",
        _WAIT,
        lambda result: result.data_waits,
        late_data,
        "all ranks waited for the data of this rank, for {value:.0%} of the time of steps {since} to {step}",
        "use a larger --num-workers, or check the disk of the machine on which this rank runs",
    ),
    Rule(
        "slow_rank",
        _SLOW,
        lambda result: over_median(result.compute_times),
        slow_rank,
        "all ranks waited for this rank, because in steps {since} to {step}, it took {value:.2f} times as "
        "long as the median rank for the same work",
        "check the machine on which this rank runs for throttled clocks, heat and other processes, for "
        "example with mhr doctor",
    ),
)


@dataclass(frozen=True)
class LateRank:
    """The rank that delays the others most."""

    rule: Rule
    rank: int
    value: float
    since: int  # the first step of those that were judged
    more: int = 0  # number of other ranks that are late by the same rule


def sentence(rule: Rule, host: str, event: Mapping[str, Any]) -> str:
    """A late rank in words, from the fields of its event."""
    more = int(event.get("more", 0))
    others = f"; {more} more rank{'s are' if more > 1 else ' is'} late as well" if more else ""
    return f"rank {event['rank']}{f' ({host})' if host else ''}: {rule.words.format(**event)}{others}"


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
                value, rank = max(late)
                found.append(LateRank(rule, rank, value, step - _STEPS + 1, more=len(late) - 1))
        return found
