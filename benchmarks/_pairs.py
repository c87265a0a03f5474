"""What every benchmark shares: the import path, flags, timing two things in turn, and the table of ratios.

A ratio is taken within a pair of runs that follow each other, so that what else the machine does hits both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT not in sys.path:  # a benchmark runs from any folder, whether the package is installed or not
    sys.path.insert(1, _ROOT)


class Seconds(NamedTuple):
    """How long a piece of work took."""

    wall: float
    cpu: float  # of this process, all threads


def stopwatch(work: Callable[[], object]) -> Seconds:
    """Time ``work``, and what it left to a GPU."""
    import torch

    wait: Callable[[], object] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wait()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


@dataclass(frozen=True)
class PairedTimes:
    """One line of the table: ``ours`` against ``base``, as many pairs of each."""

    case: str
    goal: float | None  # None: nothing was promised
    base: list[Seconds]
    ours: list[Seconds]

    def ratios(self, clock: str) -> list[float]:
        """Of each pair; ``clock`` is a field of :class:`Seconds`."""
        pairs = zip(self.base, self.ours, strict=True)
        return [getattr(ours, clock) / getattr(base, clock) for base, ours in pairs]

    def cells(self, clock: str) -> list[str]:
        """The line's text, one string a column; ``clock`` decides whether the goal is met."""
        ratios = self.ratios(clock)
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        times = [
            f"{statistics.median(getattr(each, clock) for each in side) * 1e3:.2f}"
            for side in (self.base, self.ours)
        ]
        wall = f"{statistics.median(self.ratios('wall')):.3f}"
        goal, verdict = (
            ("", "")
            if self.goal is None
            else (f"<= {self.goal:.2f}", "met" if middle <= self.goal else "missed")
        )
        return [
            self.case,
            str(len(ratios)),
            *times,
            f"{middle:.3f}",
            f"{low:.3f} to {high:.3f}",
            wall,
            goal,
            verdict,
        ]


def deciding_clock() -> str:
    """``cpu`` where all work is this process's own, which its neighbours then cannot change; ``wall`` where a
    GPU works.
    """
    import torch

    return "wall" if torch.cuda.is_available() else "cpu"


def in_turn(
    base: Callable[[], Seconds], ours: Callable[[], Seconds], *, pairs: int
) -> tuple[list[Seconds], list[Seconds]]:
    """Run both ``pairs`` times: base first, ours first, and so on, so that neither profits from its place."""
    first, second = in_turns([base, ours], rounds=pairs)
    return first, second


def in_turns(works: Sequence[Callable[[], Seconds]], *, rounds: int) -> list[list[Seconds]]:
    """The same for any number of works: all of them forwards, then backwards, and so on."""
    times: list[list[Seconds]] = [[] for _ in works]
    for number in range(rounds):
        forwards = range(len(works))
        for which in forwards if number % 2 == 0 else reversed(forwards):
            times[which].append(works[which]())
    return times


def print_table(rows: Iterable[PairedTimes], *, base: str, ours: str, clock: str | None = None) -> None:
    """The rows under their headings, on stdout, each printed as soon as it is measured; ``clock``: other than
    the deciding one.
    """
    clock = clock or deciding_clock()
    print(
        f"Times are medians of {clock} time over all pairs.  Each ratio compares the two runs of one pair; "
        "the table shows the median and the quartiles of the ratios.  Wall ratio: the same for wall time."
    )
    head = ["case", "pairs", f"{base} ms", f"{ours} ms", "ratio", "quartiles", "wall ratio", "goal", ""]
    widths = [38, 5, 9, 9, 7, 14, 10, 7, 6]
    _line(head, widths)
    for row in rows:
        _line(row.cells(clock), widths)


def _line(cells: list[str], widths: list[int]) -> None:
    first, *rest = zip(cells, widths, strict=True)
    print(
        "  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]).rstrip(),
        flush=True,
    )


def flags(description: str, *, pairs: int) -> argparse.ArgumentParser:
    """The flags of every benchmark; a wrong one ends with status 2."""
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs",
        type=_at_least_two,
        default=pairs,
        metavar="N",
        help=f"number of measured pairs of runs in each case (default: {pairs})",
    )
    parser.add_argument(
        "--warm-up",
        type=int,
        default=3,
        metavar="N",
        help="number of pairs to run before the measured pairs (default: 3)",
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="number of torch threads (default: 1)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="use tiny sizes and few pairs, to test that the benchmark runs"
    )
    return parser


def _at_least_two(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(
            f"{number} must be at least 2, because the table shows the spread between pairs"
        )
    return number
