"""Chapters about fine-tuning runs and scaling studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_hyperrouter.analysis.intervals import mean_and_half
from megatron_hyperrouter.report.figures import Drawing, Line, lines
from megatron_hyperrouter.report.page import Section
from megatron_hyperrouter.report.sources import Finetuning, ScalingStudy, names_of
from megatron_hyperrouter.studies.tables import with_half

_COLUMNS = (
    "The columns of runs.csv. Times are in seconds, memory is in bytes, and losses are in nats per token."
)
SCORES = (("accuracy", ".4f"), ("macro_f1", ".4f"), ("loss", ".4f"), ("ece", ".4f"))


def finetuning_chapters(tunings: Sequence[Finetuning], drawing: Drawing) -> list[Section]:
    """Scores of each fine-tuned model at each k."""
    section = Section("Fine-tuning")
    rows: list[list[object]] = []
    series: dict[str, Line] = {}
    names = names_of([tuning.folder for tuning in tunings])
    for name, tuning in zip(names, tunings, strict=True):
        splits = dict.fromkeys(str(row.get("split", "test")) for row in tuning.results)
        for split in splits:
            found = [row for row in tuning.results if str(row.get("split", "test")) == split]
            ks = sorted({row["topk"] for row in found})
            table = {k: [row for row in found if row["topk"] == k] for k in ks}
            for k, group in table.items():
                cells = [_score(group, measure, form) for measure, form in SCORES]
                rows.append([name, split, k, len(group), *cells])
            if split == "test" or len(splits) == 1:
                pairs = [mean_and_half([row["accuracy"] for row in group]) for group in table.values()]
                series[name] = Line(ks, [m for m, _ in pairs], [half or 0.0 for _, half in pairs], marker="o")
    heads = ["fine-tuning run", "split", "k", "seeds", *(measure.replace("_", " ") for measure, _ in SCORES)]
    note = (
        "Mean ± half of the 95 % t-interval over seeds. ECE: expected calibration error. The "
        "interval covers the variation between fine-tuning seeds, but not the choice of test texts: "
        "on n other test texts, the accuracy can differ by up to 1 / sqrt(n)."
    )
    section.table(heads, rows, name="transfer", note=note)

    def fill(axes: Any) -> None:
        lines(axes, series, xlabel="active experts k at test", ylabel="accuracy", log_x=True)

    if series:
        section.figure(
            drawing.draw(fill), "Accuracy on the test set at each k: mean and 95 % interval over seeds."
        )
    return [section]


def scaling_chapters(study: ScalingStudy, drawing: Drawing) -> list[Section]:
    """Losses against training FLOPs and the fitted curves; or speed against ranks."""
    if not study.rows:
        return []
    heads = list(study.rows[0])
    runs, found = Section("Runs"), Section("Loss and size" if "flops" in heads else "Speed")
    runs.table(
        heads, [[_short(row[head]) for head in heads] for row in study.rows], name="runs", note=_COLUMNS
    )
    if "flops" in heads:
        losses = [head for head in heads if head.startswith("bits_per_byte")]
        known = [head for head in losses if all(row[head] for row in study.rows)]
        shown = known or [head for head in heads if head.startswith("lm_loss")]
        found.figure(
            _work_figure(study.rows, shown, drawing), "One point for each run; both axes are logarithmic."
        )
        _fits(found, study.curves)
    elif "tokens_per_second" in heads:
        found.figure(
            _speed_figure(study.rows, drawing),
            "Tokens per second of all ranks together, at each number of ranks; one line for each layout.",
        )
    return [found, runs]


def _work_figure(rows: Sequence[Mapping[str, str]], scores: Sequence[str], drawing: Drawing) -> str:
    def fill(axes: Any) -> None:
        series = {}
        for score in scores:
            pairs = sorted((float(row["flops"]), float(row[score])) for row in rows if row[score])
            series[score.replace("_", " ")] = Line(
                [x for x, _ in pairs], [y for _, y in pairs], style="", marker="o"
            )
        lines(
            axes,
            series,
            xlabel="training FLOPs",
            ylabel=scores[0].rpartition("_k")[0].replace("_", " ") or "loss",
        )
        axes.set_xscale("log")
        axes.set_yscale("log")

    return drawing.draw(fill, size=(8.0, 3.6))


def _fits(section: Section, curves: Sequence[Mapping[str, Any]]) -> None:
    rows: list[list[object]] = []
    for curve in curves:
        name = curve.get("runs") or "all runs"
        if "refused" in curve:
            rows.append([name, curve.get("k") or "-", "-", "-", "-", curve["refused"]])
            continue
        for parameter, value in curve["parameters"].items():
            low, high = curve["intervals"].get(parameter, (None, None))
            interval = "-" if low is None else f"{low:.4g} to {high:.4g}"
            bound = (
                "the runs do not determine this parameter: the fit ended at a limit of its range"
                if parameter in curve.get("at_bounds", [])
                else ""
            )
            rows.append([name, curve.get("k") or "-", parameter, f"{value:.4g}", interval, bound])
    heads = ["runs", "k", "parameter", "value", "95 % interval", "remark"]
    note = (
        "Fitted curve: L = E + A / N^alpha + B / D^beta. L: loss in nats per token. N: number of "
        "parameters. D: number of training tokens. If all runs have the same N or the same D, the "
        "curve does not have that term."
    )
    section.table(heads, rows, name="fit", note=note)


def _speed_figure(rows: Sequence[Mapping[str, str]], drawing: Drawing) -> str:
    def fill(axes: Any) -> None:
        series = {}
        for layout in dict.fromkeys(row["layout"] for row in rows):
            own = [row for row in rows if row["layout"] == layout]
            ranks = sorted({int(row["ranks"]) for row in own})
            pairs = [
                mean_and_half([float(row["tokens_per_second"]) for row in own if int(row["ranks"]) == number])
                for number in ranks
            ]
            series[layout] = Line(ranks, [m for m, _ in pairs], [h or 0.0 for _, h in pairs], marker="o")
        lines(axes, series, xlabel="ranks", ylabel="tokens per second", log_x=True)
        axes.set_ylim(bottom=0)

    return drawing.draw(fill)


def _score(group: Sequence[Mapping[str, Any]], measure: str, form: str) -> str:
    values = [row[measure] for row in group if row.get(measure) is not None]
    return with_half(*mean_and_half(values), form) if values else "-"


def _short(text: str) -> str:
    """A number of a CSV file, rounded for readers."""
    try:
        value = float(text)
    except ValueError:
        return text
    return f"{value:.6g}" if abs(value) < 1e6 else f"{value:,.0f}"
