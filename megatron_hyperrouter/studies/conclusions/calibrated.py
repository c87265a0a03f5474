"""The constants of a machine, fitted to a speed study; ``mhr plan`` uses them to predict step times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hyperrouter.guard.events import FILE as EVENTS_FILE
from megatron_hyperrouter.guard.events import read_events
from megatron_hyperrouter.studies.tables import markdown_table

if TYPE_CHECKING:
    from megatron_hyperrouter.studies.speed import Timed

NAME = "calibration.json"
_CONSTANTS = {
    "flops": "the speed of a rank",
    "inside": "the bandwidth inside a node",
    "outside": "the bandwidth between nodes",
    "latency": "the latency",
}
_UNITS = {
    "flops": (1e-12, "TFLOP/s per rank"),
    "inside": (1e-9, "GB/s inside a node"),
    "outside": (1e-9, "GB/s between nodes"),
    "latency": (1e6, "us per message"),
}


def write_calibration_of(plans: Sequence[Timed], seconds: Sequence[float], per_node: int, path: Path) -> str:
    """The calibration file, and the table of predicted and measured times; ``seconds``: the mean step of each
    of ``plans``, which have different rows.
    """
    from megatron_hyperrouter.data.tokenize.tokenizer import tokenizer_of
    from megatron_hyperrouter.planning.calibration import Measured, calibrate
    from megatron_hyperrouter.planning.machine import write_calibration

    vocabulary = tokenizer_of(plans[0].config.data).vocab_size
    rows = [Measured(plan.config, plan.row.ranks, each) for plan, each in zip(plans, seconds, strict=True)]
    found = calibrate(rows, vocabulary, per_node)
    told = [
        {
            "ranks": plan.row.ranks,
            "layout": plan.row.layout,
            "measured_seconds": measured,
            "predicted_seconds": predicted,
        }
        for plan, measured, predicted in zip(plans, seconds, found.predicted, strict=True)
    ]
    devices = _devices(plans)
    write_calibration(path, found.machine, {"devices": devices, "fitted": list(found.fitted), "steps": told})
    body = [
        [
            str(each["ranks"]),
            str(each["layout"]),
            f"{measured * 1e3:,.1f}",
            f"{predicted * 1e3:,.1f}",
            f"{predicted / measured:.3f}",
        ]
        for each, measured, predicted in zip(told, seconds, found.predicted, strict=True)
    ]
    table = markdown_table(["ranks", "layout", "measured, ms", "predicted, ms", "predicted / measured"], body)
    constants = ", ".join(
        f"{getattr(found.machine, name) * _UNITS[name][0]:.3g} {_UNITS[name][1]}" for name in found.fitted
    )
    left = [name for name in _UNITS if name not in found.fitted]
    others = (
        (
            f" These runs do not determine {' and '.join(_CONSTANTS[name] for name in left)}, so "
            "mhr plan uses its default value for each of these constants."
        )
        if left
        else ""
    )
    return (
        f"\n{table}\nStep time as measured, and as mhr plan predicts it with the constants that were fitted "
        f"to {'this row' if len(rows) == 1 else f'these {len(rows)} rows'}: {constants}.{others} To plan "
        f"with the fitted constants, use mhr plan --calibration {path}.\n"
    )


def _devices(plans: Sequence[Timed]) -> list[str]:
    """The names of the GPUs or CPUs that the runs recorded, each once."""
    events = [event for plan in plans for event in read_events(plan.folder / EVENTS_FILE)]
    return sorted({str(event["device"]) for event in events if event.get("device")})
