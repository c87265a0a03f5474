"""Ranks that delay all others in every step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median_low

LATE_STEPS, LATE_SHARE = 20, 0.1  # steps, and the share of their time that a rank may cost the others
_PAUSE = 500  # steps between two reports


@dataclass
class LateData:
    """Names the rank whose data are so late that all ranks wait for it in every step."""

    clock: Callable[[], float] = time.monotonic
    _waits: deque[tuple[float, ...]] = field(default_factory=lambda: deque(maxlen=LATE_STEPS))
    _times: deque[float] = field(default_factory=lambda: deque(maxlen=LATE_STEPS + 1))
    _quiet_until: int = 0

    def see(self, step: int, waits: tuple[float, ...]) -> tuple[int, float] | None:
        """The rank, and the share of the last steps that it costs; None if none costs much."""
        self._times.append(self.clock())
        if len(waits) < 2 or (self._waits and len(self._waits[-1]) != len(waits)):
            return None
        self._waits.append(waits)
        if len(self._times) <= LATE_STEPS or step < self._quiet_until:
            return None
        sums = [sum(each) for each in zip(*self._waits, strict=True)]
        rank = max(range(len(sums)), key=sums.__getitem__)
        share = (sums[rank] - median_low(sums)) / max(self._times[-1] - self._times[0], 1e-9)
        if share <= LATE_SHARE:
            return None
        self._quiet_until = step + _PAUSE
        return rank, share
