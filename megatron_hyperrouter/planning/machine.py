"""The speed of a machine: assumed, or measured by a speed study and saved in a calibration file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_hyperrouter.errors import ConfigError, Problem
from megatron_hyperrouter.files import write_json

FORMAT = 1


@dataclass(frozen=True)
class Machine:
    """One kind of GPU, and the network between many of them."""

    memory: float  # bytes of one GPU
    per_node: int
    # FLOP/s of matrix products that one GPU sustains in a training step: its peak x utilisation
    flops: float = 989e12 * 0.40
    inside: float = 300e9  # bytes/s from one GPU to others of its node
    outside: float = 40e9  # bytes/s from one GPU to other nodes
    latency: float = 20e-6  # seconds of one message
    reserve: float = 2.5e9  # bytes: CUDA's context, NCCL's buffers, work space of kernels
    skew: float = 1.3  # load of the busiest rank of experts over the mean
    source: str = "assumed, not measured: an H100 at 40 % utilization, NVLink, 400 Gb/s per GPU between nodes"

    def assumptions(self) -> list[str]:
        """What a prediction rests on, a line each."""
        return [
            f"a GPU sustains {self.flops / 1e12:,.0f} TFLOP/s; its bandwidth is "
            f"{self.inside / 1e9:,.0f} GB/s inside a node and {self.outside / 1e9:,.0f} GB/s between "
            f"nodes; the latency is {self.latency * 1e6:.0f} us per message ({self.source})",
            f"the busiest expert-parallel rank has {self.skew:g} times the mean load of all ranks (--skew)",
            (
                f"{self.reserve / 1e9:g} GB per GPU are reserved for CUDA, NCCL and kernel workspaces "
                "(--reserve); memory fragmentation is not included"
            ),
            "communication does not overlap with computation; tensor-parallel ranks are in one node",
        ]


MEASURED = ("flops", "inside", "outside", "latency")
_NAMES = dict(
    zip(MEASURED, ("TFLOP/s", "GB/s inside a node", "GB/s between nodes", "us per message"), strict=True)
)


def calibrated(machine: Machine, path: Path) -> Machine:
    """The same machine with the constants of a calibration file; raises ConfigError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([_bad(path, f"cannot be read ({error.strerror})")]) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError([_bad(path, "must be a calibration file, but is not JSON")]) from error
    if not isinstance(found, dict) or "format" not in found:
        raise ConfigError([_bad(path, "must be a calibration file, but has no format number")])
    if found["format"] != FORMAT:
        rule = f"has format {found['format']}, but this version of mhr plan reads format {FORMAT}"
        raise ConfigError([_bad(path, rule)])
    values = {name: found[name] for name in MEASURED if found.get(name) is not None}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
            raise ConfigError([_bad(path, f"has {name} = {value}, which must be a number greater than 0")])
    if not values:
        raise ConfigError([_bad(path, f"must contain at least one of {', '.join(MEASURED)}")])
    measured = found.get("measured")
    notes = measured if isinstance(measured, dict) else {}
    fitted = notes["fitted"] if isinstance(notes.get("fitted"), list) else list(values)
    devices = notes["devices"] if isinstance(notes.get("devices"), list) else []
    on = f" on {' and '.join(map(str, devices))}" if devices else ""
    return replace(
        machine,
        **{name: float(value) for name, value in values.items()},  # type: ignore[arg-type]
        source=f"measured{on}: {path}" + _not_measured([name for name in MEASURED if name not in fitted]),
    )


def _not_measured(names: list[str]) -> str:
    """The study keeps assumed constants where its layouts do not determine them."""
    return f"; assumed, not measured: {', '.join(_NAMES[name] for name in names)}" if names else ""


def write_calibration(path: Path, machine: Machine, measured: object) -> None:
    """Keep the constants of a machine, and what they were fitted to."""
    numbers = {name: value for name, value in asdict(machine).items() if name in MEASURED}
    write_json(path, {"format": FORMAT, **numbers, "measured": measured})


def _bad(path: Path, rule: str) -> Problem:
    return Problem("--calibration", path, rule, "create a calibration file with mhr scaling speed")
