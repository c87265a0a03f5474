"""The fit recovers the constants of made-up step times, and a plan uses them from the calibration file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.planning.calibration import Measured, calibrate, work_of_row
from megatron_hyperrouter.planning.machine import MEASURED, Machine, calibrated, write_calibration
from megatron_hyperrouter.routers import ROUTERS

MODEL = (
    "--num-layers 8 --hidden-size 1024 --num-attention-heads 16 --num-experts 16 --moe-ffn-hidden-size 1024 "
    "--seq-length 2048 --micro-batch-size 1 --global-batch-size 64 --bf16 --mock-data"
).split()
LAYOUTS = (
    (8, ""),
    (8, "--expert-model-parallel-size 8"),
    (16, "--expert-model-parallel-size 16"),
    (16, "--tensor-model-parallel-size 4 --sequence-parallel"),
    (32, "--pipeline-model-parallel-size 4"),
    (64, "--expert-model-parallel-size 8"),
)
TRUE = Machine(memory=80e9, per_node=8, flops=200e12, inside=150e9, outside=20e9, latency=30e-6)


def rows(machine: Machine) -> list[Measured]:
    found = []
    for ranks, flags in LAYOUTS:
        config = parse([*MODEL, *flags.split()], routers=ROUTERS, world_size=ranks)
        row = Measured(config, ranks, 1.0)
        found.append(replace(row, seconds=work_of_row(row, 1000, 8, machine.skew).seconds(machine)))
    return found


def test_constants_come_back(tmp_path: Path) -> None:
    found = calibrate(rows(TRUE), 1000, 8)
    assert set(found.fitted) == set(MEASURED)
    for name in MEASURED:
        assert getattr(found.machine, name) == pytest.approx(getattr(TRUE, name), rel=1e-4), name
    assert found.predicted == pytest.approx([row.seconds for row in rows(TRUE)], rel=1e-6)
    write_calibration(tmp_path / "c.json", found.machine, {"rows": 6})
    read = calibrated(Machine(memory=40e9, per_node=4), tmp_path / "c.json")
    assert (read.memory, read.per_node) == (40e9, 4)
    assert read.flops == pytest.approx(200e12, rel=1e-4) and str(tmp_path) in read.source


def test_one_row_tells_the_rate_alone() -> None:
    found = calibrate(rows(TRUE)[:1], 1000, 8)
    assert found.fitted == ("flops",)
    assert found.predicted == pytest.approx([rows(TRUE)[0].seconds])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "has no format number"),
        ("{}", "has no format number"),
        ('{"format": 9}', "has format 9, but this version of mhr plan reads format 1"),
        ('{"format": 1}', "must contain at least one of flops, inside"),
        ('{"format": 1, "flops": -1.0}', "has flops = -1.0, which must be a number greater than 0"),
        ('{"format": 1, "latency": NaN}', "has latency = nan"),
        ('{"format": 1, "outside": Infinity}', "has outside = inf"),
        ('{"format": 1, "inside": true}', "has inside = True"),
        ('{"format": 1, "inside": "fast"}', "has inside = fast"),
        (f'{{"format": 1, "inside": 1{"0" * 400}}}', "must be a number greater than 0"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "c.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(why)):
        calibrated(TRUE, tmp_path / "c.json")


def test_a_plan_says_which_constants_a_file_did_not_measure(tmp_path: Path) -> None:
    found = calibrate(rows(TRUE)[:1], 1000, 8)
    write_calibration(tmp_path / "c.json", found.machine, {"fitted": list(found.fitted)})
    first = calibrated(TRUE, tmp_path / "c.json").assumptions()[0]
    assert first.endswith("assumed, not measured: GB/s inside a node, GB/s between nodes, us per message)")


def test_a_plan_names_the_devices_that_were_measured(tmp_path: Path) -> None:
    note = {"devices": ["NVIDIA H100 80GB HBM3"], "fitted": list(MEASURED)}
    write_calibration(tmp_path / "c.json", TRUE, note)
    first = calibrated(TRUE, tmp_path / "c.json").assumptions()[0]
    assert first.endswith(f"(measured on NVIDIA H100 80GB HBM3: {tmp_path / 'c.json'})")


@pytest.mark.parametrize("measured", [None, 3, {"fitted": None}, {"fitted": 3}, {"devices": 3}])
def test_a_note_of_another_kind_on_what_was_measured_is_no_error(tmp_path: Path, measured: object) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"format": 1, "flops": 1e12, "measured": measured}), encoding="utf-8")
    assert calibrated(TRUE, path).flops == 1e12
