"""Table, fits and plot of the loss study of mhr scaling."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.studies.conclusions.optimal import optimal_text, plot_optimal
from megatron_hyperrouter.studies.tables import finish, if_matplotlib, markdown_table, with_half, write_csv
from megatron_hyperrouter.terminal import show

if TYPE_CHECKING:
    from megatron_hyperrouter.analysis.scaling import ScalingFit
    from megatron_hyperrouter.studies.loss import Trained

ResultRow = dict[str, Any]
TrainedWithRows = Sequence[tuple["Trained", ResultRow]]
COUNTS = ("parameters_total", "parameters_active", "tokens", "flops")


@dataclass
class FittedCurve:
    """The runs of one curve, and the fitted curve, or why there is none."""

    label: str
    score: str  # "" or "_k4"
    sizes: dict[str, list[float]]
    losses: list[float]
    fit: ScalingFit | None = None
    refused: str = ""

    @property
    def name(self) -> str:
        """For the terminal."""
        return ", ".join(filter(None, [self.label, self.score.replace("_k", "k = ")])) or "all runs"


def obstacles(plans: Sequence[Trained], args: Namespace) -> Iterator[str]:
    """Reasons why no curve can be fitted, known before anything runs.  Different models count as different N,
    unless they differ only in experts that are not active.
    """
    from dataclasses import replace

    from megatron_hyperrouter.analysis.scaling import obstacle
    from megatron_hyperrouter.config.derived import batch_sizes

    names = curve_axes([plan.point for plan in plans], args.curve_for)
    models: dict[Any, float] = {}
    groups: dict[str, list[tuple[float, float]]] = {}
    for plan in plans:
        model = replace(
            plan.config.model,
            seq_length=1,
            num_experts=1 if args.size == "active" else plan.config.model.num_experts,
        )
        samples = batch_sizes(plan.config, plan.ranks).samples(plan.config.train.train_iters)
        tokens = samples * plan.config.model.seq_length
        number = models.setdefault(model, 2.0 ** len(models))
        groups.setdefault(curve_label(plan.point, names), []).append((number, tokens))
    for label, pairs in groups.items():
        numbers, tokens_of = zip(*pairs, strict=True)
        if reason := obstacle({"N": numbers, "D": tokens_of}):
            yield f"{label}: {reason}" if label else reason


def write_results(told: TrainedWithRows, args: Namespace) -> None:
    """runs.csv, table.csv, fit.json, table.md and, where matplotlib is, the plot; tables go to stdout as
    well.
    """
    rows = [row for _, row in told]
    scores = score_names(rows, args.topk_eval)
    measures = [
        *COUNTS,
        *(f"{name}{score}" for score in scores for name in ("lm_loss", "bits_per_byte")),
        "seconds",
    ]
    flat = [flat_row(row, scores) for row in rows]
    axes = list(told[0][0].point)
    write_csv(
        args.output / "runs.csv",
        [*axes, "seed", *measures],
        [[row[name] for name in (*axes, "seed", *measures)] for row in flat],
    )
    points = means(flat, axes, measures)
    spread = [name for name in measures if name not in COUNTS]
    heads = [*axes, "seeds", *COUNTS, *(f"{name}{end}" for name in spread for end in ("", "_half95"))]
    body = [
        [*key, seeds, *(row[name][0] for name in COUNTS), *(part for name in spread for part in row[name])]
        for key, (seeds, row) in points.items()
    ]
    write_csv(args.output / "table.csv", heads, body)
    curves = list(curves_of(told, scores, args))
    content = [record(curve, args.size) for curve in curves]
    (args.output / "fit.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    text = markdown(points, axes, scores, curves, args)
    fitted = [(curve.name, curve.fit) for curve in curves if curve.fit is not None]
    flops = [float(row["flops"]) for row in flat]
    text += optimal_text(fitted, max(flops), args.size)
    (args.output / "table.md").write_text(text, encoding="utf-8")
    show(text.rstrip("\n"))
    if_matplotlib(lambda: plot(curves, args.size, args.output / "scaling.png"))
    if_matplotlib(lambda: plot_optimal(fitted, flops, args.size, args.output / "optimal.png"))


def score_names(rows: Sequence[ResultRow], topks: Sequence[int] | None) -> list[str]:
    """The name of a score: with its k, or without k if each run was scored at its own."""
    return [f"_k{score['topk']}" for score in rows[0]["scores"]] if topks else [""]


def flat_row(row: ResultRow, scores: Sequence[str]) -> ResultRow:
    """A row with its scores as columns."""
    found = {name: value for name, value in row.items() if name != "scores"}
    for name, score in zip(scores, row["scores"], strict=True):
        found |= {f"{measure}{name}": score[measure] for measure in ("lm_loss", "bits_per_byte")}
    return found


Points = Mapping[tuple[Any, ...], tuple[int, dict[str, tuple[float | None, float | None]]]]


def means(rows: Sequence[ResultRow], axes: Sequence[str], measures: Sequence[str]) -> Points:
    """Values of the axes -> (seeds, measure -> mean and half of its interval over seeds); None if a
    run has no such number.
    """
    from megatron_hyperrouter.analysis.intervals import mean_and_half

    groups: dict[tuple[Any, ...], list[ResultRow]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in axes), []).append(row)
    found: dict[tuple[Any, ...], tuple[int, dict[str, tuple[float | None, float | None]]]] = {}
    for key, group in groups.items():
        columns = {name: [row[name] for row in group] for name in measures}
        found[key] = (
            len(group),
            {
                name: (None, None) if None in column else mean_and_half(column)
                for name, column in columns.items()
            },
        )
    return found


# ------------------------------------------------------------------------------------------- curves
def curve_axes(points: Sequence[Mapping[str, Any]], curve_for: Sequence[str]) -> list[str]:
    """The settings that each get separate curves: those of --curve-for, and those whose values are not
    numbers.
    """
    words = [
        name
        for name in points[0]
        if any(isinstance(point[name], bool) or not isinstance(point[name], (int, float)) for point in points)
    ]
    return list(dict.fromkeys([*words, *curve_for]))


def curve_label(point: Mapping[str, Any], names: Sequence[str]) -> str:
    """``router.name = topk``."""
    return ", ".join(f"{name} = {point[name]}" for name in names)


def curves_of(told: TrainedWithRows, scores: Sequence[str], args: Namespace) -> Iterator[FittedCurve]:
    """A curve for each group of runs and each score, fitted where it can be."""
    from megatron_hyperrouter.analysis.scaling import fit, obstacle

    names = curve_axes([plan.point for plan, _ in told], args.curve_for)
    for label in dict.fromkeys(curve_label(plan.point, names) for plan, _ in told):
        rows = [row for plan, row in told if curve_label(plan.point, names) == label]
        for number, score in enumerate(scores):
            scored = [row["scores"][number] for row in rows]
            sizes = {
                "N": [float(each[args.size]) for each in scored],
                "D": [float(row["tokens"]) for row in rows],
            }
            curve = FittedCurve(label, score, sizes, [each["lm_loss"] for each in scored])
            curve.refused = obstacle(sizes)
            if not curve.refused:
                curve.fit = fit(sizes, curve.losses, resamples=args.resamples)
            yield curve


def record(curve: FittedCurve, size: str) -> dict[str, Any]:
    """One curve for a program."""
    head = {"runs": curve.label, "k": int(curve.score.removeprefix("_k")) if curve.score else None, "N": size}
    if curve.fit is None:
        return {**head, "refused": curve.refused}
    fit = curve.fit
    return {
        **head,
        "parameters": fit.parameters,
        "intervals": {name: list(interval) for name, interval in fit.intervals.items()},
        "level": fit.level,
        "rms_log_loss": fit.rms,
        "number_of_runs": fit.runs,
        "different_sizes": fit.points,
        "optimal_exponents": fit.optimal_exponents(),
        "at_bounds": list(fit.at_bounds),
    }


# ------------------------------------------------------------------------------------------- tables
def markdown(
    points: Points, axes: Sequence[str], scores: Sequence[str], curves: Sequence[FittedCurve], args: Namespace
) -> str:
    """Tables for readers, and what their columns are."""
    known = all(row[f"bits_per_byte{score}"][0] is not None for _, row in points.values() for score in scores)
    unit, measure = ("bits/byte", "bits_per_byte") if known else ("nats/token", "lm_loss")
    heads = [
        *axes,
        "parameters",
        "active parameters",
        "training tokens",
        "FLOPs",
        *(f"{unit}{score.replace('_k', ', k = ')}" for score in scores),
        "seconds",
    ]
    body = []
    for key, (_, row) in points.items():
        cells = [f"{row[name][0]:.3g}" if name == "flops" else f"{row[name][0]:,.0f}" for name in COUNTS]
        for name, digits in (*((f"{measure}{score}", ".4f") for score in scores), ("seconds", ".1f")):
            mean, half = row[name]
            assert mean is not None
            cells.append(with_half(mean, half, digits))
        body.append([*map(str, key), *cells])
    seeds = " or ".join(map(str, sorted({seeds for seeds, _ in points.values()})))
    interval = "" if seeds == "1" else "mean ± half of the 95 % t-interval over seeds; "
    about = (
        f"Scores on the {args.score} split: {interval}number of seeds: {seeds}. The training FLOPs are "
        "estimated; mhr scaling loss --help explains the estimate. Seconds: sum of the step times."
    )
    return f"{markdown_table(heads, body)}\n{about}\n\n{fits_text(curves, args.size)}"


def fits_text(curves: Sequence[FittedCurve], size: str) -> str:
    """The fitted curves, and the reasons for missing ones."""
    fitted = [(curve, curve.fit) for curve in curves if curve.fit is not None]
    text = ""
    if fitted:
        names = list(dict.fromkeys(name for _, fit in fitted for name in fit.parameters))
        heads = ["fit", *names, "RMS error of log loss", "runs"]
        body = []
        for curve, fit in fitted:
            shown = [_shown(fit, name) if name in fit.parameters else "" for name in names]
            body.append([curve.name, *shown, f"{fit.rms:.1e}", str(fit.runs)])
        text = (
            f"{markdown_table(heads, body)}\nThe loss is in nats per token. N: number of {size} parameters. "
            "D: number of training tokens. In brackets: 95 % intervals.\n"
        )
        for curve, fit in fitted:
            if best := fit.optimal_exponents():
                low, high = fit.intervals["optimal_N"]
                text += (
                    f"{curve.name}: if the compute C is proportional to N D, the compute-optimal N grows as "
                    f"C^{best['N']:.2f} [{low:.2f}, {high:.2f}], and the compute-optimal D as "
                    f"C^{1 - best['N']:.2f}.\n"
                )
            if fit.at_bounds:
                text += (
                    f"{curve.name}: the runs do not determine {' and '.join(fit.at_bounds)} (the fit ended "
                    "at a limit of its range), so the other values are uncertain.\n"
                )
    return text + "".join(
        f"No curve was fitted for {curve.name}: {curve.refused}.\n" for curve in curves if curve.fit is None
    )


def _shown(fit: ScalingFit, name: str) -> str:
    low, high = fit.intervals[name]
    return f"{fit.parameters[name]:.4g} [{low:.4g}, {high:.4g}]"


def plot(curves: Sequence[FittedCurve], size: str, path: Path) -> None:
    """Losses of all runs, and the fitted curves, over N, or over D where N is the same in all; a panel
    for each k.
    """
    import numpy as np
    from matplotlib.figure import Figure

    scores = list(dict.fromkeys(curve.score for curve in curves))
    over = "N" if any(len(set(curve.sizes["N"])) > 1 for curve in curves) else "D"
    other = "D" if over == "N" else "N"
    figure = Figure(figsize=(6.5 * len(scores), 4.5), layout="constrained")
    for axes, score in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores, strict=True):
        for curve in (each for each in curves if each.score == score):
            for fixed in sorted(set(curve.sizes[other])):
                pairs = [
                    (x, y)
                    for x, z, y in zip(curve.sizes[over], curve.sizes[other], curve.losses, strict=True)
                    if z == fixed
                ]
                label = ", ".join(filter(None, [curve.label, f"{other} = {fixed:.3g}"]))
                marks = axes.scatter(*zip(*pairs, strict=True), label=label, s=18)
                if curve.fit is not None:
                    grid = np.geomspace(min(curve.sizes[over]), max(curve.sizes[over]), 100)
                    foretold = [curve.fit.loss(**{over: x, other: fixed}) for x in grid]
                    axes.plot(grid, foretold, color=marks.get_facecolor()[0], linewidth=1)
        axes.set_xscale("log")
        title = f"k = {score.removeprefix('_k')}" if score else "k of each run"
        axes.set(
            xlabel=f"N, {size} parameters" if over == "N" else "D, tokens",
            ylabel="loss, nats per token",
            title=title,
        )
    finish(figure, path)
