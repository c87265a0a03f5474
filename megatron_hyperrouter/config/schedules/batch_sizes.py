"""The number of samples in each step: constant, or growing (``--rampup-batch-size``)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple


class _Stage(NamedTuple):
    """Steps of one size."""

    step: int  # completed steps before the first one
    samples: int  # read before it
    size: int


def grows_to(full: int, rampup: Sequence[int]) -> bool:
    """Whether START and INCREMENT lead to the full size."""
    start, increment, _ = rampup
    return start < full and (full - start) % increment == 0


class BatchSizes:
    """The samples of each step, as a function of the step alone.

    While the batch grows, its size follows from the samples that were read before, by the formula of
    megatron-core's ``RampupBatchsizeNumMicroBatchesCalculator``: after every SAMPLES / number of increments
    samples it is larger by INCREMENT, from START up to the full size.
    """

    def __init__(self, full: int, rampup: Sequence[int] | None = None) -> None:
        """``full``: --global-batch-size; ``rampup``: START, INCREMENT and SAMPLES of --rampup-batch-size.

        ValueError if these do not lead to the full size.
        """
        if rampup is not None and not grows_to(full, rampup):
            raise ValueError(f"rampup = {rampup} does not grow to full = {full}")
        self.full = full
        self.rampup = None if rampup is None else (rampup[0], rampup[1], rampup[2])
        self._stages = [_Stage(0, 0, self._size(0))]
        while self._stages[-1].size < full:
            self._stages.append(self._next(self._stages[-1]))

    def samples(self, step: int) -> int:
        """Samples that the first ``step`` steps read."""
        stage = self._stages[bisect_right(self._stages, step, key=lambda stage: stage.step) - 1]
        return stage.samples + (step - stage.step) * stage.size

    def size(self, step: int) -> int:
        """Samples of the step that follows ``step`` completed ones."""
        return self.samples(step + 1) - self.samples(step)

    def steps_within(self, samples: int) -> int:
        """The largest number of steps that read at most ``samples`` samples."""
        stage = self._stages[bisect_right(self._stages, samples, key=lambda stage: stage.samples) - 1]
        return stage.step + (samples - stage.samples) // stage.size

    def progress(self, step: int) -> float:
        """Samples of the first ``step`` steps, counted in full batches; the learning rate follows this
        number.
        """
        return step if len(self._stages) == 1 else self.samples(step) / self.full

    def _size(self, samples: int) -> int:
        """Samples of the step that follows the first ``samples`` samples."""
        if self.rampup is None or samples > self.rampup[2]:
            return self.full
        start, increment, until = self.rampup
        increments = (self.full - start) // increment
        # in floating point, as in megatron-core: where it rounds, so do we
        return start + int(samples / (until / increments)) * increment

    def _next(self, now: _Stage) -> _Stage:
        """The first stage after ``now``; its beginning is estimated, then found exactly."""
        assert self.rampup is not None, "a batch that does not grow has one stage"
        start, increment, until = self.rampup
        end = until * (now.size - start + increment) / (self.full - start)
        steps = max(math.ceil((end - now.samples) / now.size), 1)
        while steps > 1 and self._size(now.samples + (steps - 1) * now.size) > now.size:
            steps -= 1
        while self._size(now.samples + steps * now.size) == now.size:
            steps += 1
        samples = now.samples + steps * now.size
        return _Stage(now.step + steps, samples, self._size(samples))
