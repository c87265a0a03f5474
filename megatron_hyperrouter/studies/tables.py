"""What the tables and plots of all studies share."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_hyperrouter.terminal import note


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Full precision; None is an empty cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column is aligned left, the others right."""
    return "".join(
        f"| {' | '.join(line)} |\n" for line in (heads, [":--", *["--:"] * (len(heads) - 1)], *rows)
    )


def with_half(mean: float | None, half: float | None, digits: str, sign: str = "") -> str:
    """``mean ± half``, or a dash; ``digits`` as in a format: ``.4f``; ``sign`` "+" shows it of positive
    numbers as well.
    """
    if mean is None:
        return "-"
    shown = f"{mean:{sign}{digits}}"
    return shown if half is None else f"{shown} ± {half:{digits}}"


def if_matplotlib(plot: Callable[[], None]) -> None:
    """Plot, or say what is missing."""
    try:
        plot()
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("matplotlib"):
            raise
        note("no plots were made, because matplotlib is not installed\n  remedy: run bash tools/setup_env.sh")


def finish(figure: Any, path: Path) -> None:
    """Grid and legend; then the file."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
