"""k as a pure function of the step: every rank and a resumed run compute the same one."""

from __future__ import annotations

import math

KINDS = ("constant", "linear", "cosine", "exponential", "multistep")


def topk_at(step: int, *, start: int, end: int, steps: int, kind: str = "linear") -> int:
    """Return k, the number of active experts, after ``step`` completed optimizer steps.

    k is ``start`` at step 0, and ``end`` from step ``steps`` on.  If ``start > end``, k shrinks.  Between
    these steps, ``kind`` decides:

    - ``constant``: k is always ``end``, also at step 0.
    - ``linear``, ``cosine``, ``exponential``: k follows this curve, rounded (halves to even) as in the code
      of SMoE-Dropout (arXiv 2303.01610).  In a long run, the exponential schedule leaves about 0.99^300
      = 4.9 % of the growth for its last step.
    - ``multistep``: k doubles (or halves) until ``end``.  Each value lasts for an equal share of the steps.

    Raises ValueError if ``start``, ``end`` or ``steps`` is below 1, if ``step`` is negative, or for another
    ``kind``.
    """
    if min(start, end, steps) < 1 or step < 0:
        raise ValueError(
            f"start = {start}, end = {end} and steps = {steps} must each be at least 1, "
            f"and step = {step} must be at least 0"
        )
    if kind not in KINDS:
        raise ValueError(f"kind = {kind}: must be one of {', '.join(KINDS)}")
    if kind == "constant" or step >= steps:
        return end
    if kind == "multistep":
        values = _doublings(start, end)
        return values[len(values) * step // steps]
    if kind == "linear":
        return round((end - start) * step / steps) + start
    left = (
        math.cos(math.pi * step / (2 * steps)) if kind == "cosine" else 0.99 ** _three_hundredths(step, steps)
    )
    return round((start - end) * left) + end


def _three_hundredths(step: int, steps: int) -> int:
    """Number of completed parts of a run that is divided into 300; the published division needs at least
    300 steps.
    """
    return step // (steps // 300) if steps >= 300 else 300 * step // steps


def _doublings(start: int, end: int) -> list[int]:
    """start, 2 start, 4 start, ... end; or the halves of start down to end."""
    values = [start]
    while values[-1] != end:
        values.append(min(2 * values[-1], end) if end > start else max(values[-1] // 2, end))
    return values
