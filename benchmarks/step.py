"""Compare training steps and evaluations of both engines with hand-written torch and transformers.

    python benchmarks/step.py                         both cases, about 10 minutes on one core
    python benchmarks/step.py --side deepspeed --side "megatron:hyper" --case "few wide experts"

Each side is a separate process.  The sides take turns, so that other work on the machine affects all of
them. The side "floor" is a minimal model in torch, with grouped_mm and fused AdamW.  Each ratio divides
the time of a side by the time of the floor in the same round.  The sides are floor, transformers
(:grouped_mm or :eager), deepspeed and megatron (both with :ROUTER).  All sides train in float32 with tied
embeddings, norms on queries and keys, a softmax over the logits of the chosen experts, and gradient
clipping at 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _pairs import flags
from _step_sides import CASES, TINY, Sizes

SIDES = ("floor", "transformers", "transformers:eager", "deepspeed", "megatron", "megatron:hyper")
GOALS = {"step": 1.15, "evaluate": 1.10, "peak": 1.15}
WORKER = Path(__file__).with_name("_step_sides.py")


class Worker:
    """A side's process."""

    def __init__(self, name: str, sizes: Sizes, threads: int, more: list[str]) -> None:
        given = [name, json.dumps(sizes._asdict()), *(["--", *more] if more else [])]
        places = [str(WORKER.parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(filter(None, places)),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), *given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.name, self.start = name, self._answer()
        self.cpu: dict[str, list[float]] = {"step": [], "evaluate": []}
        self.peak = 0.0

    def run(self, word: str) -> None:
        """One step or evaluation."""
        told = self.ask(word)
        self.cpu[word].append(told["cpu"])
        self.peak = told["peak"]

    def ask(self, word: str) -> dict[str, Any]:
        """The answer to a word."""
        assert self._process.stdin is not None
        print(word, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"side {self.name!r} ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Let it go."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def workers(names: list[str], sizes: Sizes, args: argparse.Namespace) -> Iterator[list[Worker]]:
    """All sides, each after its first step."""
    started: list[Worker] = []
    try:
        for name in names:
            more = args.flag if name.startswith(("deepspeed", "megatron")) else []
            started.append(Worker(name, sizes, args.threads, more))
        yield started
    finally:
        for worker in started:
            worker.end()


def measure(sides: list[Worker], *, rounds: int, warm_up: int) -> None:
    """Rounds of a step and an evaluation each, forwards and backwards through the sides."""
    for number in range(warm_up + rounds):
        for word in ("step", "evaluate"):
            for side in sides if number % 2 == 0 else reversed(sides):
                side.run(word)
                if number < warm_up:
                    side.cpu[word].clear()


def ratio(side: Worker, floor: Worker, word: str) -> list[float]:
    """Of each round."""
    return [own / base for own, base in zip(side.cpu[word], floor.cpu[word], strict=True)]


def table(case: str, sizes: Sizes, sides: list[Worker]) -> list[str]:
    """The measured sides as a Markdown table."""
    floor = sides[0]
    tokens = sizes.batch * sizes.sequence
    lines = [
        f"**{case}**: {', '.join(f'{name} {value}' for name, value in sizes._asdict().items())}",
        "",
        "| side | CPU s per step | tokens per CPU s | step / floor (quartiles) | evaluation / floor "
        "| peak MiB | peak / floor | CPU s to the first step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for side in sides:
        low, middle, high = statistics.quantiles(ratio(side, floor, "step"), n=4, method="inclusive")
        seconds = statistics.median(side.cpu["step"])
        cells = (
            side.name,
            f"{seconds:.3f}",
            f"{tokens / seconds:,.0f}",
            f"{middle:.2f} ({low:.2f} to {high:.2f})",
            f"{statistics.median(ratio(side, floor, 'evaluate')):.2f}",
            f"{side.peak:,.0f}",
            f"{side.peak / floor.peak:.2f}",
            f"{side.start['cpu']:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    goals = ", ".join(f"{word} <= {goal:.2f}" for word, goal in GOALS.items())
    return [*lines, "", f"Medians of {len(floor.cpu['step'])} rounds. Goals of our engines: {goals}."]


def profiles(sides: list[Worker]) -> list[str]:
    """Where the time of a step goes."""
    lines = ["", "| side | operator calls | operators with the most self time, % |", "|---|---|---|"]
    for side in sides:
        told = side.ask("profile")
        dearest = list(told["shares"].items())[:8]
        named = ", ".join(f"{name.removeprefix('aten::')} {share:.0f}" for name, share in dearest)
        lines.append(f"| {side.name} | {told['calls']:,} | {named} |")
    return lines


def main() -> None:
    """Measure, and print Markdown."""
    parser = flags(__doc__ or "", pairs=6)
    parser.add_argument(
        "--side", action="append", help=f"side to measure; may be repeated (default: {', '.join(SIDES)})"
    )
    parser.add_argument(
        "--case", action="append", choices=list(CASES), help="case to measure; may be repeated"
    )
    parser.add_argument(
        "--flag",
        action="append",
        default=[],
        help="further word for the command line of deepspeed and megatron; may be repeated",
    )
    parser.add_argument("--profile", action="store_true", help="show which operators take the time")
    args = parser.parse_args()
    cases = TINY if args.quick else {name: CASES[name] for name in args.case or CASES}
    rounds, warm_up = (2, 0) if args.quick else (args.pairs, args.warm_up)
    names = ["floor", *(name for name in args.side or SIDES if name != "floor")]
    for case, sizes in cases.items():
        with workers(names, sizes, args) as sides:
            measure(sides, rounds=rounds, warm_up=warm_up)
            lines = table(case, sizes, sides) + (profiles(sides) if args.profile else [])
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
