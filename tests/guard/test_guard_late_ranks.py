"""The rule that names ranks whose data are late or whose computation is slow, on made-up numbers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import pytest

from megatron_hyperrouter.engines.base import StepResult
from megatron_hyperrouter.guard.health.late_ranks import LateRanks

Found = tuple[str, int, int, float]  # alarm, step, rank, value


def found(numbers: Iterable[tuple[Sequence[float], Sequence[float]]], *, more: int = 0) -> list[Found]:
    """What the ranks' waits and compute times of one step after the other show, each step of one second;
    ``more``: number of ranks beside each that is named.
    """
    late, seen = LateRanks(), []
    for step, (waits_R, times_R) in enumerate(numbers, 1):
        result = StepResult(
            *(3.0, 1.0, 0.0, 1.0),
            layers={},
            stop=False,
            peak_memory=0,
            data_waits=tuple(waits_R),
            compute_times=tuple(times_R),
            seconds=float(step > 1),
        )
        for each in late.see(step, result):
            assert (each.since, each.more) == (step - 19, more)
            seen.append((each.rule.alarm, step, each.rank, each.value))
    return seen


class TestLateData:
    """One rank of four waits for its data; a step takes one second."""

    def found(self, wait: float, steps: int = 60) -> list[Found]:
        return found([((0.01, 0.02, wait, 0.01), (1.0,) * 4)] * steps)

    def test_is_named_once(self) -> None:
        assert self.found(0.51) == [("late_data", 21, 2, pytest.approx(0.5))]

    def test_is_named_again_after_a_while(self) -> None:
        assert [(step, rank) for _, step, rank, _ in self.found(0.51, 600)] == [(21, 2), (521, 2)]

    def test_what_costs_little_is_not(self) -> None:
        assert self.found(0.1) == []

    def test_data_that_are_late_everywhere_single_nobody_out(self) -> None:
        assert found([((0.5, 0.5, 0.5), (1.0,) * 3)] * 60) == []


class TestSlowRank:
    """Ranks that take long for the same work."""

    @staticmethod
    def found(times: Iterable[Sequence[float]], *, more: int = 0) -> list[Found]:
        return found((((0.0,) * len(times_R), times_R) for times_R in times), more=more)

    @staticmethod
    def by_loops(times: Sequence[Sequence[float]]) -> tuple[int, int, float] | None:
        """The first step, counted from 1, at which a rank was slow for 20 steps, which are not the first of
        all; that rank, and how slow it was.
        """
        for last in range(20, len(times)):
            slowest = None
            for rank in range(len(times[0])):
                factors = []
                for step in range(last - 19, last + 1):
                    ascending = sorted(times[step])
                    factors.append(times[step][rank] / ascending[(len(ascending) - 1) // 2])
                mean = sum(factors) / 20
                if all(factor > 1.1 for factor in factors) and (slowest is None or mean > slowest[1]):
                    slowest = (rank, mean)
            if slowest is not None:
                return last + 1, *slowest
        return None

    def test_as_plain_loops_say(self) -> None:
        rng, named = random.Random(1), 0
        for _ in range(80):
            ranks, slow, since = rng.randint(2, 7), rng.randrange(2), rng.randrange(40)
            factor, noise = rng.choice([1.0, 1.08, 1.15, 1.3, 3.0]), rng.choice([0.01, 0.03, 0.2])
            times = [
                [
                    rng.lognormvariate(0, noise) * (factor if rank == slow and step >= since else 1.0)
                    for rank in range(ranks)
                ]
                for step in range(80)
            ]
            expected = self.by_loops(times)
            told = [(step, rank, value) for _, step, rank, value in self.found(times)]
            assert told == ([] if expected is None else [pytest.approx(expected)]), (factor, noise)
            named += expected is not None
        assert 10 < named < 70, "both kinds of runs are among them"

    def test_one_quick_step_in_twenty_acquits(self) -> None:
        times = [(1.0, 1.05 if step % 20 == 5 else 1.5) for step in range(400)]
        assert self.found(times) == []

    def test_all_ranks_of_a_hot_machine_are_slow(self) -> None:
        """None of them is the slowest in each step, but each is slow in all of them."""
        times = [[1.0] * 8 + [1.5 + 0.3 * (rank == step % 8) for rank in range(8)] for step in range(1, 22)]
        ((alarm, step, rank, value),) = self.found(times, more=7)
        assert (alarm, step) == ("slow_rank", 21) and rank >= 8 and 1.5 < value < 1.6

    def test_unknown_times_say_nothing(self) -> None:
        """A pipeline stage may have no such work, and a run none at all."""
        assert self.found([(0.0, 1.0, 1.05)] * 60) == []
        assert self.found([(0.0, 0.0)] * 60) == self.found([()] * 60) == self.found([(1.0,)] * 60) == []
        ((_, step, rank, value),) = self.found([(0.0, 1.0, 1.2)] * 60)
        assert (step, rank, value) == (21, 2, pytest.approx(1.2))

    def test_a_healthy_noisy_run_is_not_named(self) -> None:
        """Times of two ranks on two cores that others use, too: twice as long in every fourth step."""
        rng = random.Random(2)
        times = [
            [rng.lognormvariate(0, 0.2) * (2 if rng.random() < 0.25 else 1) for _ in range(2)]
            for _ in range(20_000)
        ]
        beyond = [max(times_R) > 1.1 * min(times_R) for times_R in times]
        assert sum(beyond) > 0.7 * len(times), "in most steps one of them is slower by more than a tenth"
        assert self.found(times) == []


def test_both_kinds_at_once() -> None:
    alarms = found([((0.0, 0.4, 0.0), (1.0, 1.0, 2.0))] * 30)
    assert [each[:3] for each in alarms] == [("late_data", 21, 1), ("slow_rank", 21, 2)]
