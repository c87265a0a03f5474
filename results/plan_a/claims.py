"""Judge the claims F1 to F7 of results/README.md by the runs of plan A, and make tables of these runs.

python results/plan_a/claims.py runs/plan_a          # prints Markdown
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from megatron_hyperrouter.analysis.intervals import mean_and_half

Run = Mapping[str, Any]  # results.json of one run
Runs = Mapping[str, Mapping[int, Run]]  # label -> seed -> run
KS = (1, 2, 4, 8, 16)
PAIRS = (  # the differences in the table of A1
    ("hyper", "smoe_dropout"),
    ("matched", "smoe_dropout"),
    ("hyper", "matched"),
    ("paper", "smoe_dropout"),
    ("topk", "matched"),
    ("topk", "hyper"),
)
WATCHED_FROM = 40  # the alarms watch a run from this step on: twice the warm-up of the learning rate


class Interval(NamedTuple):
    """A mean over seeds and its 95 % interval."""

    mean: float
    half: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f}" + ("" if math.isinf(self.half) else f" ± {self.half:.3f}")

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.mean + self.half


class Claim(NamedTuple):
    """A claim, the verdict on it, and the numbers."""

    name: str
    verdict: str
    numbers: str


def interval(values: list[float]) -> Interval:
    """The mean and interval of one value per seed. With a single seed, the interval is infinitely wide."""
    mean, half = mean_and_half(values)
    return Interval(mean, math.inf if half is None else half, len(values))


def difference(runs: Runs, left: str, right: str, value: Callable[[Run], float]) -> Interval:
    """The value of ``left`` minus the value of ``right``, paired by seed."""
    seeds = sorted(set(runs[left]) & set(runs[right]))
    return interval([value(runs[left][seed]) - value(runs[right][seed]) for seed in seeds])


def bits(topk: int) -> Callable[[Run], float]:
    """A function that returns a run's bits per byte with ``topk`` active experts."""
    return lambda run: next(float(row["bits_per_byte"]) for row in run["results"] if row["topk"] == topk)


def layers(*names: str) -> Callable[[Run], float]:
    """A function that returns a measure of a run: the mean over the layers, on test data, at the final k."""

    def value(run: Run) -> float:
        found = []
        for row in run["analysis"][-1]["layers"]:
            for name in names:
                row = row[name]
            found.append(float(row))
        return fmean(found)

    return value


def verdict(supported: bool, refuted: bool) -> str:
    """The verdict as a word. If the intervals are too wide, a claim is neither supported nor refuted."""
    return "supported" if supported else "refuted" if refuted else "not decided"


def of_a1(runs: Runs) -> Iterator[Claim]:
    """Judge the claims F1 to F4 and F7 by the runs of A1."""
    few, full = (difference(runs, "hyper", "matched", bits(k)) for k in (1, 16))
    yield Claim(
        "F1: HyperRouter is better with few experts", verdict(few.high < 0, few.low > 0), f"{few} (k = 1)"
    )
    yield Claim(
        "F2: HyperRouter loses nothing at the trained k",
        verdict(full.high <= 0.01, full.low > 0.01),
        f"{full} (k = 16)",
    )
    entropy, mutual = (
        difference(runs, "hyper", "matched", layers(name)) for name in ("entropy", "mutual_information")
    )
    yield Claim(
        "F3: HyperRouter has lower entropy and higher mutual information",
        verdict(entropy.high < 0 < mutual.low, entropy.low > 0 or mutual.high < 0),
        f"entropy {entropy}, mutual information {mutual} nats",
    )
    rank = difference(runs, "hyper", "matched", layers("jacobian", "effective_rank"))
    drift = interval([layers("jacobian", "drift")(run) for run in runs["hyper"].values()])
    yield Claim(
        "F4: fixed routers restrict the representation",
        verdict(rank.low > 0 and drift.low >= 0.05, rank.high < 0 or drift.high < 0.05),
        f"effective rank {rank}, drift of `hyper` {drift}",
    )
    trained = {
        (other, k): difference(runs, "topk", other, bits(k)) for other in ("hyper", "matched") for k in KS
    }
    worse = any(all(trained[other, k].low > 0 for other in ("hyper", "matched")) for k in KS)
    yield Claim(
        "F7: trained routers collapse",
        verdict(worse, all(each.high <= 0.01 for each in trained.values())),
        f"`topk` minus `hyper` {trained['hyper', 1]} (k = 1), {trained['hyper', 16]} (k = 16)",
    )


def of_a3(runs: Runs) -> Iterator[Claim]:
    """Judge the claim F5 by the runs of A3, for each of the two methods."""
    for label in ("competesmoe", "simsmoe"):
        alike = difference(runs, label, "topk_aux", layers("mean_similarity"))
        loss = difference(runs, label, "topk_aux", bits(2))
        yield Claim(
            f"F5: {label} reduces collapse",
            verdict(alike.high < 0 and loss.high < 0, alike.low > 0 or loss.low > 0),
            f"similarity {alike}, bits per byte {loss} (k = 2)",
        )


def of_a4(runs: Runs) -> Iterator[Claim]:
    """Judge the claim F6 by the runs of A4."""
    found = difference(
        runs,
        "hyper",
        "matched",
        lambda run: next(r["accuracy"] for r in run["results"] if (r["topk"], r["split"]) == (2, "test")),
    )
    yield Claim(
        "F6: HyperRouter transfers better to a task",
        verdict(found.low > 0, found.high < 0),
        f"accuracy {found} (k = 2)",
    )


def differences(runs: Runs) -> Iterator[str]:
    """The lines of a table with the paired differences at each k."""
    yield "| bits per byte | " + " | ".join(f"k = {k}" for k in KS) + " |"
    yield "|---" * (len(KS) + 1) + "|"
    for left, right in PAIRS:
        cells = [str(difference(runs, left, right, bits(k))) for k in KS]
        yield f"| `{left}` minus `{right}` | " + " | ".join(cells) + " |"


def trials(runs: Runs) -> Iterator[str]:
    """The lines of a table with the variants of HyperRouter in A1b, A1c or A1d: one row for each router."""
    asked = (("hyper", 1), ("topk", 1), ("topk", 16), ("matched", 1), ("matched", 16))
    against = [(other, k) for other, k in asked if other in runs]
    heads = ["router", "drift", "logit std", *(f"minus `{other}`, k = {k}" for other, k in against)]
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for label, by_seed in runs.items():
        drift = interval([layers("jacobian", "drift")(run) for run in by_seed.values()])
        std = interval([layers("logit_std")(run) for run in by_seed.values()])
        cells = [
            "" if label == other else str(difference(runs, label, other, bits(k))) for other, k in against
        ]
        yield f"| `{label}` | {str(drift)[1:]} | {str(std)[1:]} | " + " | ".join(cells) + " |"


def alarms(folders: list[Path]) -> tuple[int, dict[str, int]]:
    """The number of steps that the alarms watched, and the number of alarms of each kind."""
    steps, found = 0, dict[str, int]()
    for folder in folders:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        steps += max(int(results["steps"]) - WATCHED_FROM, 0)
        for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if event["event"] == "alarm" and event["alarm"] not in ("late_data", "slow_rank"):
                found[event["alarm"]] = found.get(event["alarm"], 0) + 1
    return steps, found


def upper_bound(count: int, steps: int) -> float:
    """The exact 95 % upper bound of the rate of alarms per step. The number of alarms has a Poisson
    distribution; bisection finds the bound.
    """
    low, high = 0.0, 10.0 * (count + 3)
    for _ in range(100):
        middle = (low + high) / 2
        below = sum(math.exp(-middle) * middle**n / math.factorial(n) for n in range(count + 1))
        low, high = (middle, high) if below > 0.05 else (low, middle)
    return high / steps


def read(folder: Path) -> Runs:
    """The finished runs in the folder of a block: those of mhr compare, or those of mhr finetune."""
    runs: dict[str, dict[int, Run]] = {}
    for path in sorted([*folder.glob("runs/*/results.json"), *folder.glob("*-seed*/results.json")]):
        label, _, seed = path.parent.name.rpartition("-seed")
        runs.setdefault(label, {})[int(seed)] = json.loads(path.read_text(encoding="utf-8"))
    return runs


def shared(runs: Runs) -> Runs:
    """Only the runs of seeds that all routers have. repeat.sh links all seeds of A1 into a block, but the
    other routers of the block may have fewer seeds.
    """
    seeds = set.intersection(*map(set, runs.values())) if runs else set()
    return {label: {seed: by_seed[seed] for seed in sorted(seeds)} for label, by_seed in runs.items()}


def main() -> None:
    """Print the table of verdicts, the tables of the blocks, and the number of alarms."""
    root = Path(sys.argv[1])
    lines = ["| claim | verdict | numbers, mean ± half of the 95 % interval |", "|---|---|---|"]
    for block, judge, left_out in (
        ("A1", of_a1, ()),
        ("A3", of_a3, ("F5: competition and similarity losses reduce collapse",)),
        ("A4", of_a4, ("F6: HyperRouter transfers better to a task",)),
    ):
        runs = read(root / block)
        claims = (
            judge(runs) if runs else (Claim(name, "not decided", f"{block} was not run") for name in left_out)
        )
        lines += [f"| {each.name} | **{each.verdict}** | {each.numbers} |" for each in claims]
    if first := read(root / "A1"):
        lines += ["", f"A1, paired by seed ({len(first['hyper'])} seeds):", "", *differences(first)]
    for block in ("A1b", "A1c", "A1d"):
        if tried := shared(read(root / block)):
            seeds = len(next(iter(tried.values())))
            counted = "1 seed" if seeds == 1 else f"{seeds} seeds"
            lines += ["", f"{block}, bits per byte paired by seed ({counted}):", "", *trials(tried)]
    steps, found = alarms(sorted(path.parent for path in root.glob("A1/runs/*/results.json")))
    if steps:
        total = sum(found.values())
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(found.items())) or "none"
        lines += [
            "",
            f"Alarms of A1 in {steps:,} watched steps: {total} ({kinds}). With 95 % confidence, the rate is "
            f"at most {1000 * upper_bound(total, steps):.2f} alarms in 1,000 steps.",
        ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
