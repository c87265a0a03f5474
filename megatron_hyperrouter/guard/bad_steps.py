"""Bad steps: those whose loss or gradient norm is not finite, or far above that of the steps before.

A bad step must not change the weights.  The decision is made before the optimizer changes anything, from
numbers that are the same on every rank, so all ranks decide the same.  It depends on the last good steps.
These are part of the checkpoint, so a resumed run decides like a run that was never stopped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_hyperrouter.config.sections.guard import GuardConfig
from megatron_hyperrouter.engines.base import OwnPart, StepResult

_MOST_IN_A_ROW = 10
_LEAST_STD = 1e-4  # of the mean: if values hardly vary, small changes must not look large


@dataclass
class BadSteps:
    """Judges steps, and remembers which were left out."""

    policy: str  # --on-bad-step
    sigma: float | None  # --max-loss-sigma
    window: int  # --loss-window
    asked: set[int] = field(default_factory=set)  # to be skipped: --skip-steps
    found: set[int] = field(default_factory=set)  # skipped because they, or later steps, were bad
    in_a_row: int = 0
    _good: deque[tuple[float, float]] = field(default_factory=deque)

    @classmethod
    def of(cls, settings: GuardConfig, *, last: int) -> BadSteps:
        """The judge that the settings ask for; ``last``: the last step of the run."""
        asked = set(steps_of(settings.skip_steps, last=last))
        return cls(settings.on_bad_step, settings.max_loss_sigma, settings.loss_window, asked)

    def takes_part(self, step: int) -> bool:
        """False for a step whose data are read but not trained on."""
        return step not in self.asked and step not in self.found

    def reason(self, result: StepResult) -> str:
        """Why the step is bad; empty if it is good."""
        for name, place in (("lm_loss", 0), ("grad_norm", 1)):
            value = getattr(result, name)
            if not math.isfinite(value):
                return f"{name} is {value}"
            if self.sigma is None or len(self._good) < max(2, self.window // 2):
                continue
            past = [pair[place] for pair in self._good]
            mean = math.fsum(past) / len(past)
            std = math.sqrt(math.fsum((each - mean) ** 2 for each in past) / len(past))
            if value > mean + self.sigma * max(std, _LEAST_STD * abs(mean)):
                return (
                    f"{name} is {value:.4g}, more than {self.sigma:g} standard deviations above the mean of "
                    f"the last {len(past)} steps (mean {mean:.4g}, standard deviation {std:.3g})"
                )
        return ""

    def accept(self, result: StepResult) -> bool:
        """Judge the step; a good one joins the window."""
        if self.reason(result):
            return False
        self.in_a_row = 0
        self._good.append((result.lm_loss, result.grad_norm))
        while len(self._good) > self.window:
            self._good.popleft()
        return True

    def leave_out(self, steps: Iterable[int]) -> bool:
        """Skip these steps, of which the last is bad; False if too many in a row were bad."""
        self.found |= set(steps)
        self.in_a_row += 1
        return self.in_a_row < _MOST_IN_A_ROW

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint saves, as JSON."""
        return {
            "good": [list(pair) for pair in self._good],
            "skipped": sorted(self.found),
            "in_a_row": self.in_a_row,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state` gave; steps that were found bad since then are still skipped."""
        self._good = deque((float(loss), float(norm)) for loss, norm in state["good"])
        self.found |= {int(step) for step in state["skipped"]}
        self.in_a_row = max(self.in_a_row, int(state["in_a_row"]))  # more after a return to a checkpoint


def steps_of(ranges: Iterable[str], *, last: int) -> Iterable[int]:
    """``("105-107", "300")`` -> 105, 106, 107, 300, without those after ``last``; ValueError if a word is not
    a range of steps.
    """
    for word in ranges:
        first, dash, final = word.partition("-")
        if not (first.isdecimal() and (final.isdecimal() or not dash)):
            raise ValueError(f"{word} must be a step or a range of steps, such as 105-107")
        begin, end = int(first), int(final or first)
        if not 1 <= begin <= end:
            raise ValueError(f"{word} must start at step 1 or later and end at the same or a later step")
        yield from range(begin, min(end, last) + 1)


def attribution(first: StepResult, second: StepResult, parts: Sequence[OwnPart]) -> str:
    """Whether the fault is in the computation or in the machine, judged by repeating the bad step."""
    repeats = all(_alike(getattr(first, name), getattr(second, name)) for name in ("lm_loss", "grad_norm"))
    told = f"lm_loss {second.lm_loss:.4g}, grad_norm {second.grad_norm:.4g}"
    places = [_place(part) for part in parts if not _alike(*part.losses) or _is_lost(part)]
    where = f"; seen on {', '.join(places)}" if places else ""
    if repeats:
        return (
            f"repeating the step gave the same result ({told}), so the cause is in the data, "
            f"the settings or the weights{where}"
        )
    return f"repeating the step gave {told}, so a temporary hardware fault is likely{where}"


def _place(part: OwnPart) -> str:
    bad = f", gradient of {part.bad_gradient}" if part.bad_gradient else ""
    return f"rank {part.rank} ({part.host}, {part.device}{bad})"


def _is_lost(part: OwnPart) -> bool:
    return bool(part.bad_gradient) or not all(map(math.isfinite, part.losses))


def _alike(one: float, other: float) -> bool:
    """Equal except for the order of sums on a GPU; two numbers that are not finite count as equal."""
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.isfinite(one) == math.isfinite(other)
    return math.isclose(one, other, rel_tol=1e-3)
