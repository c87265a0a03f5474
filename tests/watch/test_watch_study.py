"""``mhr status`` of a study's folder: what it is, and each run in it; files written by hand."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from distributed import environment

from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.watch.study import lines_of_study, read_study
from megatron_hyperrouter.watch.trace import read_trace


def write_run(folder: Path, *events: dict[str, Any], steps: int = 0, results: bool = False) -> None:
    folder.mkdir(parents=True)
    (folder / "task.json").write_text("{}")
    if events:
        lines = [{"step": 0, "attempt": 1, "time": time.time() - 100, **event} for event in events]
        (folder / "events.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    records = [{"step": step, "step_time": 2.0, "tokens_per_second": 50.0} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    if results:
        (folder / "results.json").write_text("{}")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Runs that are not started, finished with and without results, failed, and unreadable."""
    runs = tmp_path / "study" / "runs"
    begin, end = {"event": "start", "total": 4}, {"event": "end", "step": 4}
    write_run(runs / "hyper-seed10")
    write_run(runs / "hyper-seed2", begin, end, steps=4)
    write_run(runs / "topk-seed1", begin, end, steps=4, results=True)
    write_run(
        runs / "topk-seed2",
        begin,
        {"event": "failure", "step": 3, "error": "OSError", "message": "a bad day"},
        steps=3,
    )
    write_run(runs / "topk-seed3", begin, steps=1)
    (runs / "topk-seed3" / "metrics.jsonl").write_text('{"step": "one", "step_time": 1}\n' * 2)
    (runs / "notes").mkdir()  # of the user: no run
    return tmp_path / "study"


def test_each_run_has_a_line(study: Path) -> None:
    found = read_study(study)
    assert found is not None
    head, counts, *lines = lines_of_study(found)
    assert head == f"{study}: study of mhr scaling"
    assert counts.startswith("5 runs so far: 2 finished, ") and counts.endswith("; 1 with results")
    words = {line.split()[0]: line for line in lines}
    assert list(words) == ["hyper-seed2", "hyper-seed10", "topk-seed1", "topk-seed2", "topk-seed3"]
    assert words["hyper-seed10"].split(maxsplit=1)[1] == "not started"
    assert words["hyper-seed2"].split()[1:] == "finished step 4 of 4, no results yet".split()
    assert words["topk-seed1"].split()[1:] == "finished step 4 of 4".split()
    assert words["topk-seed2"].split(maxsplit=1)[1].startswith("failed")
    assert "step 3 of 4: " in words["topk-seed2"] and "a bad day" in words["topk-seed2"]
    assert words["topk-seed3"].split()[1] == "unreadable" and "metrics.jsonl" in words["topk-seed3"]


def test_a_comparison_says_so(study: Path) -> None:
    (study / "study.json").write_text("{}")
    found = read_study(study)
    assert found is not None and lines_of_study(found)[0] == f"{study}: study of mhr compare"


def test_a_run_in_a_study_and_a_folder_without_runs_are_no_studies(study: Path, tmp_path: Path) -> None:
    run = study / "runs" / "topk-seed1"
    assert read_study(run) is None and read_trace(run).run_dir == run
    (tmp_path / "empty" / "runs").mkdir(parents=True)
    assert read_study(tmp_path / "empty") is None
    with pytest.raises(ConfigError, match="not a run folder"):
        read_trace(tmp_path / "empty")


def test_names_of_runs_sort_by_their_numbers(tmp_path: Path) -> None:
    names = ["1x", "1²3", "2", "10", "a", "a2", "a10", "x²-seed1"]  # ² is a digit, but no decimal
    for name in reversed(names):
        write_run(tmp_path / "runs" / name)
    found = read_study(tmp_path)
    assert found is not None and sorted(run.folder.name for run in found.runs) == sorted(names)
    order = [run.folder.name for run in found.runs]
    assert order.index("2") < order.index("10") and order.index("a2") < order.index("a10")


def test_the_command(study: Path) -> None:
    def status(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "megatron_hyperrouter", "status", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)

    text = status(str(study))
    assert (text.returncode, text.stderr) == (0, "") and text.stdout.count("\n") == 7, text
    one = json.loads(status(str(study / "runs/topk-seed2"), "--json").stdout)
    whole = json.loads(status(str(study), "--json").stdout)
    assert (whole["study"], whole["command"]) == (str(study), "mhr scaling")
    by_name = {Path(run["run"]).name: run for run in whole["runs"]}
    assert {**one, "has_results": False, "wall": 0} == {**by_name["topk-seed2"], "wall": 0}
    assert by_name["hyper-seed10"]["state"] == "not started" and by_name["topk-seed1"]["has_results"]
