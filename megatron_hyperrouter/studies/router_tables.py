"""Tables and plots of mhr compare, from the results of its runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_hyperrouter.studies.tables import finish, if_matplotlib, markdown_table, with_half, write_csv
from megatron_hyperrouter.studies.verdicts import RunsBySeed
from megatron_hyperrouter.terminal import note, show

# mean, and half of the 95 % interval; no mean where a run does not have the measure
Interval = tuple[float | None, float | None]
SeedCurve = tuple[Sequence[int], Sequence[float], Sequence[float]]  # steps, means, halves
HEADS = {
    "entropy": "router entropy",
    "load_max_over_mean": "load max/mean",
    "logit_std": "logit std",
    "mutual_information": "MI",
    "expert_similarity": "similarity",
    "effective_rank": "effective rank",
    "drift": "drift",
    "step_time": "step, ms",
}
_LOOKED_AT = ("effective_rank", "drift")  # of the router's part of the Jacobian, means over layers
POINTS = 60  # of a training curve: each the mean of the steps between


def write_tables(
    finished: Sequence[tuple[str, int, dict[str, Any]]], output: Path, study: Mapping[str, Any]
) -> None:
    """runs.csv, table.csv, differences.csv, verdicts.csv, table.md and, where matplotlib is, the plots; the
    table goes to stdout as well.  ``study``: the content of study.json.
    """
    runs: dict[str, dict[int, Mapping[str, Any]]] = {}
    for label, seed, results in finished:
        runs.setdefault(label, {})[seed] = results
    table = intervals(runs)
    measures = measures_in(runs)
    write_csv(
        output / "runs.csv",
        ["router", "seed", *measures],
        [
            [label, seed, *map(measures_of(results).get, measures)]
            for label, seeds in runs.items()
            for seed, results in seeds.items()
        ],
    )
    heads = ["router", "seeds", *(f"{measure}{ending}" for measure in measures for ending in ("", "_half95"))]
    apart = differences(runs)
    for name, part in (("table.csv", table), ("differences.csv", apart)):
        write_csv(
            output / name,
            heads,
            [[label, len(runs[label]), *chain.from_iterable(row.values())] for label, row in part.items()],
        )
    text = markdown(table, apart, runs) + asked(runs, study, output)
    (output / "table.md").write_text(text, encoding="utf-8")
    show(text.rstrip("\n"))
    if_matplotlib(lambda: plot(runs, table, apart, output))
    written = sorted(path.name for path in output.iterdir() if path.is_file())
    note(f"written to {output}: {', '.join(written)}")


def asked(runs: RunsBySeed, study: Mapping[str, Any], output: Path) -> str:
    """The table of the comparisons that were named before the runs, also as verdicts.csv; "" without any."""
    from megatron_hyperrouter.studies import verdicts

    named = verdicts.parse(study["comparisons"])
    rows = [list(map(str, each.cells())) for each in verdicts.verdicts(runs, named, effect=study["effect"])]
    if not rows:
        return ""
    write_csv(output / "verdicts.csv", verdicts.HEADS, rows)
    return f"\n{markdown_table(verdicts.HEADS, rows)}\n{verdicts.about(study['effect'])}\n"


def measures_of(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one run: ``bits_per_byte_kN`` (``lm_loss_kN``, nats per token, where bytes are unknown),
    then those of HEADS that it has.
    """
    scored = results["results"]
    unit = "lm_loss" if any(row["bits_per_byte"] is None for row in scored) else "bits_per_byte"
    known = dict(results) | dict(_looked_at(results))
    return {f"{unit}_k{row['topk']}": row[unit] for row in scored} | {
        name: known[name] for name in HEADS if name in known
    }


def _looked_at(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Measures of the Jacobian at the final k of training; a router that is not a linear map has no drift."""
    parts = [row["jacobian"] for row in results["analysis"][-1]["layers"]] if "analysis" in results else []
    for name in _LOOKED_AT:
        values = [part[name] for part in parts if part[name] is not None]
        if values and len(values) == len(parts):
            yield name, statistics.fmean(values)


def measures_in(runs: RunsBySeed) -> list[str]:
    """The columns of all tables: the measures that at least one run has, in the order of HEADS."""
    found = dict.fromkeys(
        name for seeds in runs.values() for results in seeds.values() for name in measures_of(results)
    )
    return sorted(found, key=lambda name: list(HEADS).index(name) if name in HEADS else -1)


def intervals(runs: RunsBySeed) -> dict[str, dict[str, Interval]]:
    """label -> measure -> (mean, half) over seeds."""
    names = measures_in(runs)
    table = {}
    for label, seeds in runs.items():
        columns = [measures_of(results) for results in seeds.values()]
        table[label] = {name: _interval([column.get(name) for column in columns]) for name in names}
    return table


def _interval(values: Sequence[float | None]) -> Interval:
    from megatron_hyperrouter.analysis.intervals import mean_and_half

    known = [value for value in values if value is not None]
    return mean_and_half(known) if len(known) == len(values) else (None, None)


def differences(runs: RunsBySeed) -> dict[str, dict[str, Interval]]:
    """As :func:`intervals`, of each router's numbers minus those of the first with the same seed.

    Runs of one seed share data and initial weights, so a difference varies less than either number.
    """
    names = measures_in(runs)
    (_, first), *others = runs.items()
    base = {seed: measures_of(results) for seed, results in first.items()}
    found = {}
    for label, seeds in others:
        columns = [(measures_of(results), base[seed]) for seed, results in seeds.items()]
        found[label] = {
            name: _interval([_difference(own.get(name), other.get(name)) for own, other in columns])
            for name in names
        }
    return found


def _difference(own: float | None, other: float | None) -> float | None:
    return None if own is None or other is None else own - other


def markdown(
    table: Mapping[str, Mapping[str, Interval]], apart: Mapping[str, Mapping[str, Interval]], runs: RunsBySeed
) -> str:
    """Tables for readers, and what their columns are."""
    first, measures = next(iter(table)), list(next(iter(table.values())))
    scored = [name for name in measures if name not in HEADS]
    unit = "bits per byte" if scored[0].startswith("bits") else "nats per token"
    heads = [
        *(f"k = {name.rpartition('_k')[2]}" for name in scored),
        *(HEADS[name] for name in measures if name in HEADS),
    ]

    def lines(corner: str, rows: Mapping[str, Mapping[str, Interval]], sign: str) -> str:
        body = [[label, *(cell(name, *row[name], sign) for name in measures)] for label, row in rows.items()]
        return markdown_table([corner, *heads], body)

    seeds = sorted({len(each) for each in runs.values()})
    steps = sorted({results["steps"] for each in runs.values() for results in each.values()})
    about = (
        f"Columns k = ...: {unit} on the test split with k active experts. Router entropy (in nats) and "
        "load max/mean (load of the busiest expert divided by the mean load) are averages over the last "
        "tenth of the training steps. Step time: median. The other columns use test data at the final k "
        "of training. Logit std: standard deviation of the logits. MI: mutual information between token "
        "and expert, in nats. Similarity: mean linear CKA between the outputs of two experts. Effective "
        "rank: effective rank of the router's part of the Jacobian. Drift: share of the span of the "
        "router's matrix that lies outside its span at the start of training. All values: mean ± half "
        f"of the 95 % t-interval over seeds; number of seeds: {_listed(seeds)}; training steps: "
        f"{_listed(steps)}."
    )
    text = f"{lines('router', table, '')}\n{about}\n"
    if not apart:
        return text
    pairs = f"Difference between each router and {first}, paired by seed: mean ± half of the 95 % t-interval."
    return f"{text}\n{lines(f'difference from {first}', apart, '+')}\n{pairs}\n"


def cell(measure: str, mean: float | None, half: float | None, sign: str = "") -> str:
    """``mean ± half``, with as many digits as the measure deserves; ``sign`` "+" shows it of positive numbers
    as well.
    """
    digits, scale = {
        "step_time": (1, 1e3),
        "entropy": (3, 1),
        "load_max_over_mean": (2, 1),
        "logit_std": (3, 1),
        "mutual_information": (3, 1),
        "expert_similarity": (3, 1),
        "effective_rank": (2, 1),
        "drift": (3, 1),
    }.get(measure, (4, 1))
    mean, half = (None if each is None else each * scale for each in (mean, half))
    return with_half(mean, half, f".{digits}f", sign)


def curves(runs: RunsBySeed, name: str, *, points: int | None = None) -> dict[str, SeedCurve]:
    """label -> a curve's means and halves over seeds, of the steps that all seeds have; ``points``: of that
    many pieces, each the mean of its steps.
    """
    from megatron_hyperrouter.analysis.intervals import mean_and_half

    found: dict[str, SeedCurve] = {}
    for label, seeds in runs.items():
        values = [dict(results[name]) for results in seeds.values()]
        shared = [step for step in values[0] if all(step in each for each in values)]
        if not shared:
            continue
        thinned = [_pieces([(step, each[step]) for step in shared], points) for each in values]
        steps = [step for step, _ in thinned[0]]
        pairs = [mean_and_half([curve[at][1] for curve in thinned]) for at in range(len(steps))]
        found[label] = (steps, [mean for mean, _ in pairs], [half or 0.0 for _, half in pairs])
    return found


def plot(
    runs: RunsBySeed,
    table: Mapping[str, Mapping[str, Interval]],
    apart: Mapping[str, Mapping[str, Interval]],
    output: Path,
) -> None:
    """bits_per_byte.png: score against k; differences.png: differences from the first router, paired by
    seed, against k; learning_curves.png: training and validation loss against steps.
    """
    from matplotlib.figure import Figure

    scored = [name for name in next(iter(table.values())) if name not in HEADS]
    unit = "bits per byte" if scored[0].startswith("bits") else "nats per token"
    ks = [int(name.rpartition("_k")[2]) for name in scored]
    title = "Score against k: mean and 95 % interval over seeds"
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    _against_k(figure.add_subplot(), ks, scored, table, ylabel=f"test, {unit}", title=title)
    finish(figure, output / "bits_per_byte.png")
    if apart:
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(0.0, color="grey", linewidth=1)
        title = f"Difference from {next(iter(table))}, paired by seed: mean and 95 % interval"
        _against_k(axes, ks, scored, apart, ylabel=f"test, {unit}, minus {next(iter(table))}", title=title)
        finish(figure, output / "differences.png")

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = (
        (left, curves(runs, "train_curve", points=POINTS), "training, nats per token"),
        (right, curves(runs, "valid_curve"), f"validation, {unit}"),
    )
    for axes, found, title in shown:
        for label, (steps, centres, widths) in found.items():
            (drawn,) = axes.plot(steps, centres, label=label)
            low, high = (
                [mean + sign * half for mean, half in zip(centres, widths, strict=True)] for sign in (-1, 1)
            )
            axes.fill_between(steps, low, high, alpha=0.15, color=drawn.get_color())
        axes.set(xlabel="step", ylabel=title)
    finish(figure, output / "learning_curves.png")


def _against_k(
    axes: Any,
    ks: Sequence[int],
    measures: Sequence[str],
    table: Mapping[str, Mapping[str, Interval]],
    **labels: str,
) -> None:
    """One line for each router: means with intervals, slightly shifted so that none hides another."""
    for number, (label, row) in enumerate(table.items()):
        shift = 1 + 0.015 * (number - (len(table) - 1) / 2)
        means, halves = ([row[name][part] or 0.0 for name in measures] for part in (0, 1))
        places = [k * shift for k in ks]
        axes.errorbar(places, means, halves, label=label, marker="osD^vPX*"[number % 8], capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set(xlabel="active experts k", **labels)


def _pieces(curve: Sequence[tuple[int, float]], points: int | None) -> list[tuple[int, float]]:
    if points is None or len(curve) <= points:
        return list(curve)
    size = -(-len(curve) // points)
    parts = [curve[first : first + size] for first in range(0, len(curve), size)]
    return [(part[-1][0], statistics.fmean(value for _, value in part)) for part in parts]


def _listed(values: Sequence[int]) -> str:
    return " or ".join(map(str, values))
