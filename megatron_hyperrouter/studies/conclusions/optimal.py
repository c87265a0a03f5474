"""The best model size for a budget of compute, by a fitted curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.studies.tables import finish, markdown_table

if TYPE_CHECKING:
    from megatron_hyperrouter.analysis.scaling import ScalingFit

TIMES = (1, 10, 100)  # the largest run's FLOPs
Curves = Sequence[tuple[str, "ScalingFit"]]


def optimal_text(curves: Curves, flops: float, size: str) -> str:
    """The best size and number of tokens for budgets from the largest run's ``flops`` on; "" without a curve
    of both.
    """
    body = []
    for name, fit in curves:
        if fit.optimal_exponents() is None:
            continue
        for times in TIMES:
            best, low, high = fit.best_size(times * flops)
            tokens = times * flops / 6 / best
            loss = fit.loss(N=best, D=tokens)
            body.append(
                [
                    name,
                    f"{times * flops:.2e}",
                    f"{best:.3g} [{low:.3g}, {high:.3g}]",
                    f"{tokens:.3g}",
                    f"{loss:.4f}",
                ]
            )
    if not body:
        return ""
    table = markdown_table(["fit", "FLOPs", "best N", "best D", "loss"], body)
    return (
        f"\n{table}\nFor each budget of FLOPs = 6 N D: the number of {size} parameters N and the number of "
        "training tokens D for which the fitted curve has the lowest loss. In brackets: the 95 % interval "
        "of N. Rows with more FLOPs than the largest run are extrapolations.\n"
    )


def plot_optimal(curves: Curves, flops: Sequence[float], size: str, path: Path) -> None:
    """The best size over budgets from the smallest run's to a hundred times the largest run's, with its
    interval.
    """
    import numpy as np
    from matplotlib.figure import Figure

    both = [(name, fit) for name, fit in curves if fit.optimal_exponents() is not None]
    if not both:
        return
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes: Any = figure.add_subplot()
    budgets = np.geomspace(min(flops), TIMES[-1] * max(flops), 60)
    for name, fit in both:
        best, low, high = (list(each) for each in zip(*map(fit.best_size, budgets), strict=True))
        (line,) = axes.plot(budgets, best, label=name)
        axes.fill_between(budgets, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.axvline(max(flops), color="grey", linestyle="--", linewidth=1, label="largest run")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(xlabel="training FLOPs", ylabel=f"best N, {size} parameters")
    finish(figure, path)
