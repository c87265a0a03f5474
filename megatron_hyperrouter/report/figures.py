"""Plots as SVG inside the page: the same numbers give the same bytes.

matplotlib draws them.  Text stays text, so that a reader can search it.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito's colours, for readers with any colour vision; without yellow, which is too light for lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
MARKERS = "osD^vPX*"
_SETTINGS: Any = {
    "svg.hashsalt": "megatron_hyperrouter",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "axes.titlesize": 10.0,
}
_ID = re.compile(r' id="([^"]+)"')
_USE = re.compile(r"(?:url\(#|href=\"#)([^)\"]+)")


@dataclass(frozen=True)
class Line:
    """One line of a plot; ``halves``: of the interval around each value."""

    x: Sequence[float]
    y: Sequence[float]
    halves: Sequence[float] | None = None
    style: str = "-"
    marker: str = ""


def _without_markup(figure: Figure) -> None:
    """A dollar sign in the name of a folder or a router is a dollar sign.  Ticks of a logarithmic axis need
    markup.
    """
    for axes in figure.axes:
        legend = axes.get_legend()
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *(legend.get_texts() if legend else ())):
            text.set_parse_math(False)


class Drawing:
    """Draws plots, and numbers them so that no two share an id."""

    def __init__(self) -> None:
        self._count = 0

    def draw(
        self,
        fill: Callable[[Any], None],
        *,
        size: tuple[float, float] = (8.0, 3.2),
        grid: tuple[int, int] = (1, 1),
    ) -> str:
        """The SVG of a figure of ``size`` inches; ``fill`` gets its axes: an array where ``grid`` has
        several.
        """
        with matplotlib.rc_context(_SETTINGS):
            figure = Figure(figsize=size, layout="constrained")
            fill(figure.subplots(*grid))
            _without_markup(figure)
            out = io.StringIO()
            with warnings.catch_warnings():
                # The text is in the page, and a browser has fonts for it.
                warnings.filterwarnings("ignore", message="Glyph .* missing")
                figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        self._count += 1
        return _inline(out.getvalue(), f"f{self._count}-")


def _inline(text: str, prefix: str) -> str:
    """An SVG file as an element of a page; ids that are referred to become unique."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = set(_USE.findall(text))
    text = _ID.sub(lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else "", text)
    return _USE.sub(lambda found: found[0].replace(f"#{found[1]}", f"#{prefix}{found[1]}"), text)


def lines(
    axes: Any,
    series: Mapping[str, Line],
    *,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    legend: bool = True,
) -> None:
    """Lines with bands or bars, a colour for each label in the order of ``series``."""
    drawn = []
    for number, line in enumerate(series.values()):
        color = COLORS[number % len(COLORS)]
        marker = MARKERS[number % len(MARKERS)] if line.marker else ""
        drawn += axes.plot(
            line.x, line.y, line.style, color=color, marker=marker, markersize=4, linewidth=1.4
        )
        if line.halves is not None and line.marker:
            axes.errorbar(line.x, line.y, line.halves, fmt="none", color=color, capsize=3, linewidth=1)
        elif line.halves is not None:
            low, high = (
                [y + sign * half for y, half in zip(line.y, line.halves, strict=True)] for sign in (-1, 1)
            )
            axes.fill_between(line.x, low, high, color=color, alpha=0.15, linewidth=0)
    if log_x:
        axes.set_xscale("log", base=2)
        ticks = sorted({x for line in series.values() for x in line.x})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if legend and len(series) > 1:
        axes.legend(drawn, list(series))  # a label of a line must not begin with "_"; one of a legend may


def heat(
    axes: Any,
    matrix: Sequence[Sequence[float]],
    *,
    title: str,
    low: float,
    high: float,
    cmap: str = "viridis",
) -> Any:
    """A matrix as colours; returns the image, for a colour bar."""
    image = axes.imshow(matrix, vmin=low, vmax=high, cmap=cmap, aspect="auto", interpolation="nearest")
    axes.grid(False)
    axes.set_title(title)
    return image


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last ``window`` finite values at each place; nan if there is none."""
    found = []
    for at in range(len(values)):
        recent = [value for value in values[max(at - window + 1, 0) : at + 1] if math.isfinite(value)]
        found.append(sum(recent) / len(recent) if recent else math.nan)
    return found


def thinned(x: Sequence[float], y: Sequence[float], most: int = 800) -> tuple[list[float], list[float]]:
    """At most ``most`` evenly spaced points, the last one always among them: a page of a long run stays
    small.
    """
    every = max(-(-len(x) // most), 1)
    places = sorted({*range(0, len(x), every), len(x) - 1} if len(x) else set())
    return [x[at] for at in places], [y[at] for at in places]
