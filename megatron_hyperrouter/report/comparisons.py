"""Chapters about a folder of ``mhr compare``: one colour per router, every mean with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_hyperrouter.analysis.intervals import mean_and_half
from megatron_hyperrouter.report.figures import COLORS, MARKERS, Drawing, Line, lines
from megatron_hyperrouter.report.findings import (
    JACOBIAN,
    JACOBIAN_NOTE,
    MEASURES,
    MEASURES_NOTE,
    loads_figure,
    routes_chapter,
    similarity_figure,
)
from megatron_hyperrouter.report.page import Section
from megatron_hyperrouter.report.sources import Comparison, Record, settings_in
from megatron_hyperrouter.studies import verdicts
from megatron_hyperrouter.studies.router_tables import (
    POINTS,
    Interval,
    curves,
    differences,
    intervals,
    measures_of,
)
from megatron_hyperrouter.studies.tables import with_half


def chapters(study: Comparison, drawing: Drawing) -> list[Section]:
    """All chapters."""
    unit = "bits per byte" if "bits_per_byte" in next(iter(_columns(study))) else "nats per token"
    found = [
        verdict_chapter(study),
        quality_chapter(study, drawing, unit),
        curve_chapter(study, drawing, unit),
        work_chapter(study, drawing, unit),
        routing_chapter(study, drawing),
    ]
    firsts = {label: _layers(next(iter(seeds.values()))) for label, seeds in study.runs.items()}
    if all(firsts.values()):
        found += [*matrix_chapters(firsts, drawing), jacobian_chapter(study)]
    followed = {label: next(iter(seeds.values())).get("checkpoints") for label, seeds in study.runs.items()}
    known = {label: over for label, over in followed.items() if over and len(over["steps"]) > 1}
    if known:
        found.append(routes_chapter(known, drawing))
    return [*found, facts_chapter(study)]


def verdict_chapter(study: Comparison) -> Section:
    """What was asked before the runs, and the answers."""
    section = Section("Planned comparisons")
    named = verdicts.parse(study.study.get("comparisons", []))
    effect = float(study.study.get("effect", 0.02))
    rows = [each.cells() for each in verdicts.verdicts(study.runs, named, effect=effect)]
    if not rows:
        section.text(
            "No comparison was planned before the runs (mhr compare --comparisons), so this report "
            "has no significance tests."
        )
        return section
    section.table(verdicts.HEADS, rows, name="verdicts", note=verdicts.about(effect))
    if control := study.study.get("control"):
        section.text(
            f"{control} is the control: a random router that is never trained. At the start of "
            "training, its logits have the same standard deviation as those of HyperRouter. If "
            "HyperRouter is better than the control, the scale of the logits is not the reason."
        )
    return section


def quality_chapter(study: Comparison, drawing: Drawing, unit: str) -> Section:
    """Scores at each k, and differences to the first router."""
    section = Section("Quality against k")
    table = intervals(study.runs)
    scored = [name for name in next(iter(table.values())) if "_k" in name]
    ks = [int(name.rpartition("_k")[2]) for name in scored]
    rows = [
        [label, len(study.runs[label]), *(with_half(*row[name], ".4f") for name in scored)]
        for label, row in table.items()
    ]
    heads = ["router", "seeds", *(f"k = {k}" for k in ks)]
    section.table(
        heads,
        rows,
        name="quality",
        note=f"{unit.capitalize()} on the test split with k active experts. {_MEANING}",
    )

    def against_k(table: Mapping[str, Mapping[str, Interval]], ylabel: str, skip: int = 0) -> Any:
        def fill(axes: Any) -> None:
            for number, (label, row) in enumerate(table.items(), start=skip):
                shift = 1 + 0.015 * (number - len(study.runs) / 2)
                means, halves = ([row[name][part] or 0.0 for name in scored] for part in (0, 1))
                color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
                places = [k * shift for k in ks]
                axes.errorbar(
                    places,
                    means,
                    halves,
                    color=color,
                    marker=marker,
                    markersize=4,
                    capsize=3,
                    linewidth=1.2,
                    label=label,
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks(ks, [str(k) for k in ks])
            axes.minorticks_off()
            axes.set(xlabel="active experts k", ylabel=ylabel)
            axes.legend()
            if skip:
                axes.axhline(0.0, color="#7F7F7F", linewidth=1)

        return fill

    section.figure(
        drawing.draw(against_k(table, unit)),
        f"{unit.capitalize()} at each k: mean and 95 % interval over seeds.",
    )
    apart = differences(study.runs)
    if apart:
        first = next(iter(table))
        rows = [
            [f"{label} minus {first}", *(with_half(*row[name], ".4f", "+") for name in scored)]
            for label, row in apart.items()
        ]
        section.table(["difference", *(f"k = {k}" for k in ks)], rows, name="differences")
        section.figure(
            drawing.draw(against_k(apart, f"{unit}, minus {first}", skip=1)),
            (
                f"Differences between each router and {first}: mean and 95 % interval over seeds. Each "
                "difference is between two runs with the same seed, which reduces the variance. If an "
                "interval contains 0, the runs do not show a difference."
            ),
        )
    return section


def curve_chapter(study: Comparison, drawing: Drawing, unit: str) -> Section:
    """Training and validation curves with bands over seeds."""
    section = Section("Learning curves")
    train, valid = curves(study.runs, "train_curve", points=POINTS), curves(study.runs, "valid_curve")

    def fill(axes: Any) -> None:
        for each, found, title in (
            (axes[0], train, "training, nats per token"),
            (axes[1], valid, f"validation, {unit}"),
        ):
            series = {label: Line(steps, means, halves) for label, (steps, means, halves) in found.items()}
            lines(each, series, xlabel="step", ylabel=title, legend=each is axes[0])

    section.figure(
        drawing.draw(fill, size=(8.0, 3.4), grid=(1, 2)), f"Mean and 95 % interval over seeds. {_band(study)}"
    )
    return section


def work_chapter(study: Comparison, drawing: Drawing, unit: str) -> Section:
    """Score against the forward FLOPs of a token."""
    section = Section("FLOPs against loss")
    with_flops = {
        label: seeds for label, seeds in study.runs.items() if all("flops" in told for told in seeds.values())
    }
    if not with_flops:
        return section
    points: dict[str, list[tuple[float, float, float]]] = {}
    rows: list[list[object]] = []
    for label, seeds in with_flops.items():
        first = next(iter(seeds.values()))
        points[label] = []
        for k, flops in first["flops"]["inference"].items():
            mean, half = mean_and_half([verdicts.score(told, int(k)) for told in seeds.values()])
            points[label].append((float(flops), mean, half or 0.0))
        rows.append(
            [label, f"{first['flops']['training']:.4g}", *(f"{flops:.4g}" for flops, _, _ in points[label])]
        )
    ks = list(first["flops"]["inference"])
    front = pareto([point[:2] for each in points.values() for point in each])

    def fill(axes: Any) -> None:
        series = {}
        for label, found in points.items():
            x, y, halves = zip(*found, strict=True)
            series[label] = Line(x, y, halves, style=":", marker="o")
        lines(axes, series, xlabel="forward FLOPs per token", ylabel=unit)
        axes.plot(*zip(*front, strict=True), color="#7F7F7F", linewidth=5, alpha=0.25, zorder=0)
        axes.set_xscale("log")

    section.figure(
        drawing.draw(fill),
        (
            "One point for each router and k. The grey band is the Pareto front: it joins the "
            "points for which no other point has both fewer FLOPs and a lower loss."
        ),
    )
    heads = ["router", "whole training", *(f"forward, k = {k}" for k in ks)]
    note = (
        "Estimated FLOPs of the whole training, and of the forward pass of one token with k active "
        "experts. A forward pass takes 2 FLOPs per active parameter, plus attention. A training step "
        "takes 3 times as many. Frozen hypernetworks are not counted."
    )
    section.table(heads, rows, name="flops", note=note)
    return section


def routing_chapter(study: Comparison, drawing: Drawing) -> Section:
    """Entropy, scale, mutual information, loads and similarity of each layer on evaluation data."""
    section = Section("Routing on evaluation data")
    rows: list[list[object]] = []
    for label, seeds in study.runs.items():
        for result in next(iter(seeds.values())).get("analysis", []):
            k = result["topk"]
            for layer in (row["layer"] for row in result["layers"]):
                cells = [_of(seeds, k, layer, name) for name, _, _ in MEASURES]
                if all(None not in values for values in cells):
                    shown = [
                        with_half(*mean_and_half(values), form)
                        for values, (_, _, form) in zip(cells, MEASURES, strict=True)
                    ]
                    rows.append([label, k, layer, *shown])
    heads = ["router", "k", "layer", *(head for _, head, _ in MEASURES)]
    section.table(heads, rows, name="routing", note=f"{MEASURES_NOTE} {_MEANING}")
    if rows:
        section.figure(_layer_figure(study, drawing), _LAYERS)
    return section


def _layer_figure(study: Comparison, drawing: Drawing) -> str:
    measures = [each for each in MEASURES if each[0] in ("entropy", "logit_std", "mutual_information")]

    def fill(axes: Any) -> None:
        for each, (name, title, _) in zip(axes, measures, strict=True):
            series = {}
            for label, seeds in study.runs.items():
                result = next(iter(seeds.values()))["analysis"][-1]
                layers = [row["layer"] for row in result["layers"]]
                pairs = [mean_and_half(_of(seeds, result["topk"], layer, name)) for layer in layers]
                series[label] = Line(layers, [m for m, _ in pairs], [h or 0.0 for _, h in pairs], marker="o")
            lines(each, series, xlabel="layer", ylabel=title, legend=each is axes[0])
            each.set_xticks(layers)

    return drawing.draw(fill, size=(8.0, 3.2), grid=(1, 3))


def matrix_chapters(firsts: Mapping[str, Sequence[Record]], drawing: Drawing) -> list[Section]:
    """Loads and similarity matrices of each router's first seed."""
    loads, alike = Section("Loads"), Section("Similarity of experts")
    loads.figure(
        loads_figure(firsts, drawing),
        (
            "Load of each expert divided by the mean load of its layer (1: equal loads), for the first "
            "seed. In each layer, the experts are sorted by load."
        ),
    )
    alike.figure(
        similarity_figure(firsts, drawing),
        (
            "Linear CKA between the outputs of two experts for the same tokens (1: equal up to rotation "
            "and scale; near 0: unrelated), for the first seed."
        ),
    )
    return [loads, alike]


def jacobian_chapter(study: Comparison) -> Section:
    """The measures of J_R, the router's part of the Jacobian: mean over seeds, for each layer."""
    section = Section("Router and Jacobian")
    rows: list[list[object]] = []
    for label, seeds in study.runs.items():
        result = next(iter(seeds.values()))["analysis"][-1]
        for layer in (row["layer"] for row in result["layers"]):
            cells: list[object] = []
            for name, _, form in JACOBIAN:
                values = _of(seeds, result["topk"], layer, name)
                known = [value for value in values if value is not None]
                cells.append(with_half(*mean_and_half(known), form) if len(known) == len(values) else "-")
            rows.append([label, result["topk"], layer, *cells])
    heads = ["router", "k", "layer", *(head for _, head, _ in JACOBIAN)]
    section.table(heads, rows, name="jacobian", note=f"{JACOBIAN_NOTE} {_MEANING}")
    return section


def facts_chapter(study: Comparison) -> Section:
    """What was trained, with which options."""
    section = Section("Runs")
    alone = study.study.get("jobs", 1) == 1
    rows: list[list[object]] = []
    for label, seeds in study.runs.items():
        times = [told["step_time"] for told in seeds.values()]
        settings = study.folder / "runs" / f"{label}-seed{next(iter(seeds))}" / "settings.yaml"
        found = settings_in(settings).get("router", {})
        router = ", ".join(f"{key} {value}" for key, value in found.items() if value not in (None, False))
        steps = sorted({told["steps"] for told in seeds.values()})
        time = f"{1e3 * sum(times) / len(times):.1f}" if alone else "-"
        rows.append([label, " ".join(map(str, seeds)), " or ".join(map(str, steps)), time, router])
    note = (
        ""
        if alone
        else "Step times are not shown, because several runs shared the machine (mhr compare --jobs)."
    )
    section.table(["router", "seeds", "steps", "step, ms", "options"], rows, name="runs", note=note)
    return section


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both numbers, by the first one."""
    found: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


def _columns(study: Comparison) -> list[str]:
    first = next(iter(next(iter(study.runs.values())).values()))
    return [name for name in measures_of(first) if "_k" in name]


def _layers(told: Record) -> Sequence[Record]:
    found = told.get("analysis")
    return found[-1]["layers"] if found else []


def _of(seeds: Mapping[int, Record], topk: int, layer: int, name: str) -> list[Any]:
    """A measure of one layer, paired by seed."""
    found = []
    for told in seeds.values():
        result = next(each for each in told["analysis"] if each["topk"] == topk)
        row = next(each for each in result["layers"] if each["layer"] == layer)
        found.append(row[name] if name in row else row["jacobian"][name])
    return found


def _band(study: Comparison) -> str:
    return (
        "There is only one seed, so there is no interval." if max(map(len, study.runs.values())) < 2 else ""
    )


_MEANING = "Mean ± half of the 95 % t-interval over seeds."
_LAYERS = (
    "Each layer, at the final k of training: mean and 95 % interval over seeds. Entropy depends on "
    "the scale of the logits. A router with lower entropy is more decisive only if its mutual "
    "information is higher, too."
)
