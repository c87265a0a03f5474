"""Planned comparisons of two routers, and the results of the runs for each.

A comparison reads ``LEFT:RIGHT@K``: bits per byte of LEFT minus those of RIGHT with K experts, for each
seed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hyperrouter.analysis.power import (
    ALPHA,
    PairedTest,
    holm,
    paired_test,
    runs_needed,
    sd_upper,
    smallest_effect,
)

RunsBySeed = Mapping[str, Mapping[int, Mapping[str, Any]]]  # label -> seed -> results.json
HEADS = (
    "comparison",
    "k",
    "seeds",
    "difference",
    "p (Holm)",
    "verdict",
    "detectable effect",
    "seeds needed",
)


@dataclass(frozen=True)
class Named:
    """One comparison."""

    left: str
    right: str
    topk: int

    def __str__(self) -> str:
        return f"{self.left}:{self.right}@{self.topk}"


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison.

    ``p``: adjusted by Holm over all comparisons; ``smallest_effect``: what this number of seeds detects in
    80 % of the cases; ``needed``: seeds for ``effect``, planned with the upper bound of the standard
    deviation.
    """

    named: Named
    test: PairedTest
    p: float | None
    smallest_effect: float | None
    needed: int | None
    effect: float

    @property
    def words(self) -> str:
        """The verdict; lower bits per byte are better."""
        if self.p is None:
            return "not testable with one seed"
        if self.p >= ALPHA:
            return "no difference shown"
        return f"{self.named.left} is {'better' if self.test.mean < 0 else 'worse'}"

    def cells(self) -> list[object]:
        """A row for :data:`HEADS`."""
        half = "" if self.test.half is None else f" ± {self.test.half:.4f}"
        dash = "-"
        return [
            f"{self.named.left} minus {self.named.right}",
            self.named.topk,
            self.test.runs,
            f"{self.test.mean:+.4f}{half}",
            dash if self.p is None else "below 0.0001" if self.p < 1e-4 else f"{self.p:.3g}",
            self.words,
            dash if self.smallest_effect is None else f"{self.smallest_effect:.4f}",
            "over 1000" if self.needed is None and self.p is not None else self.needed or dash,
        ]


def parse(words: Sequence[str]) -> list[Named]:
    """Comparisons as on the command line; raises ValueError that names the first that cannot be read."""
    found = []
    for word in words:
        match = re.fullmatch(r"(\w[\w.-]*):(\w[\w.-]*)@(\d+)", word)
        if match is None or match[1] == match[2]:
            raise ValueError(
                "each must have the form LEFT:RIGHT@K, with two different labels and a value of k; "
                f"{word} does not have it"
            )
        found.append(Named(match[1], match[2], int(match[3])))
    return found


def verdicts(runs: RunsBySeed, named: Sequence[Named], *, effect: float) -> list[Verdict]:
    """The verdicts on those comparisons whose runs exist."""
    tests = []
    for each in named:
        seeds = sorted(set(runs.get(each.left, {})) & set(runs.get(each.right, {})))
        differences = [
            score(runs[each.left][seed], each.topk) - score(runs[each.right][seed], each.topk)
            for seed in seeds
        ]
        if differences:
            tests.append((each, paired_test(differences)))
    adjusted = iter(holm([test.p for _, test in tests if test.p is not None]))
    found = []
    for each, test in tests:
        if test.p is None or test.sd is None:
            found.append(Verdict(each, test, None, None, None, effect))
            continue
        needed = runs_needed(sd_upper(test.sd, test.runs), effect)
        found.append(Verdict(each, test, next(adjusted), smallest_effect(test.sd, test.runs), needed, effect))
    return found


def score(results: Mapping[str, Any], topk: int) -> float:
    """Bits per byte of the test split with ``topk`` experts, or nats per token where bytes are unknown."""
    row = next(row for row in results["results"] if row["topk"] == topk)
    value = row["lm_loss"] if row["bits_per_byte"] is None else row["bits_per_byte"]
    return float(value)


def about(effect: float) -> str:
    """What the columns of the table are."""
    return (
        "These comparisons were planned before the runs. Difference: loss of the first router minus loss "
        "of the second, mean ± half of the 95 % t-interval over seeds; a negative difference means that "
        "the first router is better. Runs with the same seed share data and initial weights. p: "
        "two-sided paired t-test, adjusted by Holm's method for all comparisons in the table. "
        "Detectable effect: the difference that this number of seeds detects with a power of 80 %. "
        f"Seeds needed: the number of seeds that detects a difference of {effect:g} with a power of 80 %. "
        "This estimate is cautious: it uses the 80 % upper confidence bound of the standard deviation."
    )
