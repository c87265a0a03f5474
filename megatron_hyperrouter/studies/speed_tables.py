"""Table and plot of the speed study of mhr scaling."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.studies.conclusions.calibrated import NAME as CALIBRATION
from megatron_hyperrouter.studies.conclusions.calibrated import write_calibration_of
from megatron_hyperrouter.studies.runs import read_record
from megatron_hyperrouter.studies.tables import finish, if_matplotlib, markdown_table, with_half, write_csv
from megatron_hyperrouter.terminal import counted, show

if TYPE_CHECKING:
    from megatron_hyperrouter.studies.speed import Timed, TimedLayout

RanksAndLayout = tuple[int, str]  # ranks, layout
TimesByLayout = Mapping[RanksAndLayout, Mapping[int, Mapping[str, float]]]  # -> repetition -> measures
Table = Mapping[RanksAndLayout, Mapping[str, tuple[float, float | None]]]
SHOWN = {  # measure -> (head, digits, factor)
    "step_time": ("step, ms", ",.1f", 1e3),
    "tokens_per_second": ("tokens/s", ",.0f", 1.0),
    "tokens_per_second_per_rank": ("tokens/s per rank", ",.0f", 1.0),
    "efficiency": ("efficiency", ".3f", 1.0),
    "data_share": ("data wait", ".3f", 1.0),
    "peak_memory": ("peak memory, GiB", ".2f", 2.0**-30),
}


def write_results(plans: Sequence[Timed], refused: Sequence[TimedLayout], args: Namespace) -> None:
    """runs.csv, table.csv, table.md and, where matplotlib is, the plot; the table goes to stdout as well."""
    runs: dict[RanksAndLayout, dict[int, dict[str, float]]] = {}
    started = set()
    for plan in sorted(plans, key=lambda plan: (plan.row.ranks, plan.number)):
        told = read_record(plan.folder / "results.json", "started")
        started.add(told.pop("started"))
        runs.setdefault((plan.row.ranks, plan.row.layout), {})[plan.number] = told
    add_efficiency(runs)
    table = means(runs)
    names = ["tokens_per_step", *(name for name in SHOWN if all(name in row for row in table.values()))]
    flat = [
        [*key, number, *(row.get(name) for name in names)]
        for key, group in runs.items()
        for number, row in group.items()
    ]
    write_csv(args.output / "runs.csv", ["ranks", "layout", "run", *names], flat)
    heads = [
        "ranks",
        "layout",
        "runs",
        "tokens_per_step",
        *(f"{name}{end}" for name in names[1:] for end in ("", "_half95")),
    ]
    body = [
        [
            *key,
            len(runs[key]),
            row["tokens_per_step"][0],
            *(part for name in names[1:] for part in row.get(name, (None, None))),
        ]
        for key, row in table.items()
    ]
    write_csv(args.output / "table.csv", heads, body)
    text = markdown(table, names[1:], refused, args, started, max(len(group) for group in runs.values()))
    firsts = {(plan.row.ranks, plan.row.layout): plan for plan in reversed(plans)}
    text += write_calibration_of(
        [firsts[key] for key in table],
        [row["step_time"][0] for row in table.values()],
        args.gpus_per_node,
        args.output / CALIBRATION,
    )
    (args.output / "table.md").write_text(text, encoding="utf-8")
    show(text.rstrip("\n"))
    if_matplotlib(lambda: plot(table, args.output / "speed.png"))


def add_efficiency(runs: Mapping[RanksAndLayout, dict[int, dict[str, float]]]) -> None:
    """Tokens per second and rank against the first row, in the same repetition."""
    reference = {
        number: row["tokens_per_second_per_rank"] for number, row in next(iter(runs.values())).items()
    }
    for group in runs.values():
        for number, row in group.items():
            if number in reference:
                row["efficiency"] = row["tokens_per_second_per_rank"] / reference[number]


def means(runs: TimesByLayout) -> Table:
    """Mean and half of its interval over the repetitions that have the measure."""
    from megatron_hyperrouter.analysis.intervals import mean_and_half

    table = {}
    for key, group in runs.items():
        columns: dict[str, list[float]] = {}
        for row in group.values():
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
        table[key] = {name: mean_and_half(column) for name, column in columns.items()}
    return table


def markdown(
    table: Table,
    names: Sequence[str],
    refused: Sequence[TimedLayout],
    args: Namespace,
    started: set[str],
    repeats: int,
) -> str:
    """The table for the terminal, and notes on its validity."""
    body = []
    for (ranks, layout), row in table.items():
        cells = []
        for name in names:
            _, digits, factor = SHOWN[name]
            mean, half = row[name]
            cells.append(with_half(mean * factor, None if half is None else half * factor, digits))
        body.append([str(ranks), layout, f"{row['tokens_per_step'][0]:,.0f}", *cells])
    (ranks, layout), *others = table
    text = markdown_table(["ranks", "layout", "tokens per step", *(SHOWN[name][0] for name in names)], body)
    first = f"{ranks} rank{'s' * (ranks > 1)}, {layout}"
    text += (
        f"\n{args.scaling.capitalize()} scaling, {' and '.join(sorted(started))}. A run gives the median of "
        f"{counted(args.steps, 'step')} after {counted(args.warmup, 'warm-up step')}; the table has the mean "
        f"± half of the 95 % t-interval over {counted(repeats, 'run')}. Efficiency: tokens per second and "
        f"rank, divided by the same value of the first row ({first}). Data wait: fraction of "
        "the step time in which rank 0 waits for its batch.\n"
    )
    if any(word.endswith("cores") for word in started) and any(
        number > 1 for number, _ in [(ranks, layout), *others]
    ):
        text += "All ranks shared one machine, so these numbers do not apply to a cluster.\n"
    return text + "".join(
        f"Layout {row.layout} was not run on {counted(row.ranks, 'rank')}, because it breaks a rule: "
        f"{row.refused}.\n"
        for row in refused
    )


def plot(table: Table, path: Path) -> None:
    """Tokens per second over ranks, a line for each layout; dashed: as many times the first row's as
    ranks.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes: Any = figure.add_subplot()
    for layout in dict.fromkeys(layout for _, layout in table):
        rows = {ranks: row["tokens_per_second"] for (ranks, name), row in table.items() if name == layout}
        axes.errorbar(
            list(rows),
            [mean for mean, _ in rows.values()],
            [half or 0.0 for _, half in rows.values()],
            label=layout,
            marker="o",
            capsize=3,
        )
    numbers = sorted({ranks for ranks, _ in table})
    first, row = next(iter(table.items()))
    ideal = [row["tokens_per_second"][0] * ranks / first[0] for ranks in numbers]
    axes.plot(numbers, ideal, linestyle="--", color="grey", linewidth=1, label="linear")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(numbers, [str(ranks) for ranks in numbers])
    axes.set(xlabel="ranks", ylabel="tokens per second")
    finish(figure, path)
