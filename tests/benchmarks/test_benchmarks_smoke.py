"""The benchmarks run and print their table; their numbers are not checked, because the machine
may be busy.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed import REPOSITORY, environment

NUMBER = r"\d+\.\d+"
ROW = re.compile(
    rf"(?P<case>.+?) +(?P<pairs>\d+) +{NUMBER} +{NUMBER} +{NUMBER} +{NUMBER} to {NUMBER} +{NUMBER}( +<= "
    r"\d\.\d\d +(met|missed))?"
)


def run(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / name), *flags]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, cwd="/")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("router_step.py", ["D=32"]),
        (
            "data.py",
            ["preprocess_data.py", "preprocess_data_fast.py"]
            + ["sample index"] * 2
            + ["shuffle"] * 2
            + ["fresh dataset"] * 2
            + ["blend"] * 2
            + ["exhaustive blend"]
            + ["20 samples of 2048"] * 2,
        ),
        (
            "router_methods.py --method v2 --method simsmoe --method stablemoe",
            [
                *(
                    f"competesmoe v2, {row}"
                    for row in ("layer", "experts", "ordinary", "competing", "average")
                ),
                *(f"simsmoe, {row}" for row in ("ordinary", "comparing a pair", "average")),
                *(f"stablemoe, {row}" for row in ("stage 1", "stage 2", "average")),
            ],
        ),
        ("moe_layer.py", [f"{router} k={k}," for router in ("topk", "hyper") for k in (1, 2, 4)]),
        ("moe_layer.py --imbalance", ["k=2,", "k=8,"]),
    ],
)
def test_quick_run_prints_a_row_for_each_case(name: str, cases: list[str]) -> None:
    told = run(*name.split(), "--quick")
    assert told.returncode == 0, told.stderr
    rows = [match for line in told.stdout.splitlines() if (match := ROW.fullmatch(line.strip()))]
    assert len(rows) == len(cases), told.stdout
    for row, case in zip(rows, cases, strict=True):
        assert row["case"].startswith(case)
        assert row["pairs"] == "2"


def test_memory_of_the_loss_is_that_of_chunks() -> None:
    told = run("memory/loss.py", "--quick")
    assert told.returncode == 0, told.stderr
    rows = [line.split() for line in told.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["float32", "bfloat16"]
    assert all(row[-1] == "met" for row in rows)


@pytest.mark.parametrize("name", ["router_step.py", "router_methods.py", "moe_layer.py", "preprocess.py"])
def test_flags(name: str) -> None:
    told = run(name, "--help")
    assert told.returncode == 0 and "--quick" in told.stdout and "goal" in told.stdout
    assert run(name, "--pairs", "1").returncode == 2


def test_the_table_s_arithmetic() -> None:
    """Ratios are taken pair by pair: a pair in which the whole machine was slow does not shift them."""
    pairs = load("_pairs")
    base = [
        pairs.Seconds(wall=2.0, cpu=1.0),
        pairs.Seconds(wall=40.0, cpu=10.0),
        pairs.Seconds(wall=2.0, cpu=1.0),
    ]
    ours = [
        pairs.Seconds(wall=3.0, cpu=1.1),
        pairs.Seconds(wall=60.0, cpu=11.0),
        pairs.Seconds(wall=3.0, cpu=1.3),
    ]
    cells = pairs.PairedTimes("case", 1.1000001, base, ours).cells("cpu")
    assert cells == ["case", "3", "1000.00", "1300.00", "1.100", "1.100 to 1.200", "1.500", "<= 1.10", "met"]
    assert pairs.PairedTimes("case", 1.4, base, ours).cells("wall")[-1] == "missed"
    assert pairs.PairedTimes("case", None, base, ours).cells("cpu")[-2:] == ["", ""]


def test_runs_take_turns() -> None:
    pairs = load("_pairs")
    order: list[str] = []

    def one(name: str) -> Any:
        order.append(name)
        return pairs.Seconds(wall=float(len(order)), cpu=0.0)

    base, ours = pairs.in_turn(lambda: one("base"), lambda: one("ours"), pairs=3)
    assert order == ["base", "ours", "ours", "base", "base", "ours"]
    assert [each.wall for each in base] == [1, 4, 5] and [each.wall for each in ours] == [2, 3, 6]


def test_a_run_s_average_is_taken_pair_by_pair() -> None:
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        methods, pairs = load("router_methods"), sys.modules["_pairs"]
    finally:
        del sys.path[0]
    kinds = (pairs.Seconds(wall=1.0, cpu=10.0), pairs.Seconds(wall=5.0, cpu=50.0))
    assert methods.mean([0.75, 0.25], kinds) == pytest.approx((2.0, 20.0))
    assert {key: method.kinds[-1].share for key, method in methods.METHODS.items() if method.goal} == {
        "v1": 0.07,
        "v2": 0.07,
        "simsmoe": 1 / 16,
    }
    assert all(
        sum(kind.share for kind in method.kinds) == pytest.approx(1.0) for method in methods.METHODS.values()
    )


def load(name: str) -> Any:
    path = Path(REPOSITORY, "benchmarks", f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.processes
def test_whole_steps_are_compared_with_the_floor() -> None:
    told = run("step.py", "--quick", "--side", "megatron")
    assert told.returncode == 0, told.stderr
    rows = [line.split(" | ") for line in told.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| side", "| floor", "| megatron"]
    assert rows[1][3] == "1.00 (1.00 to 1.00)" and all(len(row) == 8 for row in rows)


@pytest.mark.processes
def test_the_run_for_a_gpu_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With toy sizes, on any device; a failed case is a row as well."""
    told = run("gpu.py", "--tiny", "--only", "mixtral: megatron hyper", "--out", str(tmp_path))
    assert told.returncode == 0, told.stderr
    (result,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert result["case"] == "mixtral: megatron hyper" and "error" not in result, result
    assert result["tokens_per_s"] > 0 and result["losses"][0] == pytest.approx(6.2, abs=0.3)  # ln 512
    assert "| mixtral: megatron hyper | " in (tmp_path / "table.md").read_text()
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    failed = load("gpu").table([{"case": "chip", "error": ["no memory"]}])
    assert failed.splitlines()[-1].startswith("| chip | failed: no memory |")
