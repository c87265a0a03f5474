"""The committed study: its settings are accepted, and its comparisons are those of its README."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_hyperrouter.commands.studies.compare import Study, read_flags

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = (ROOT / "results/plan_a/repeat.sh").read_text(encoding="utf-8").replace("\\\n", " ")
SCORED = re.search(r"^scored=\((.*)\)$", SCRIPT, re.M)[1]
LINES = [line.strip() for line in SCRIPT.splitlines() if line.strip().startswith("mhr compare")]


def study(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Study:
    monkeypatch.chdir(ROOT)
    line = line.replace('"${scored[@]}"', SCORED).replace("$jobs", "1").replace("$out", str(tmp_path))
    words = shlex.split(re.sub(r"\$\{SEEDS:-(\d)\}", r"\1", line).replace("$k", "4"))
    return Study.of(*read_flags(words[2:]))


@pytest.mark.parametrize("line", LINES, ids=lambda line: re.search(r"(A\w+)\.routers\.yaml", line)[1])
def test_every_block_is_accepted(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = study(line, monkeypatch, tmp_path)
    assert found.comparisons and all(each.topk in found.topks for each in found.comparisons)
    assert {config.model.num_experts for config in found.configs.values()} == {16}
    if "hyper" in found.configs:
        assert found.control == "matched"  # it needs no other control
        assert "matched_control" not in found.configs


@pytest.mark.parametrize("size", ["paper", "large"])
def test_plan_b_is_accepted(size: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command of ``plan_b/repeat.sh``, with the routers and comparisons of plan A's first block."""
    script = (ROOT / "results/plan_b/repeat.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = (line for line in script.splitlines() if line.startswith("mhr compare"))
    monkeypatch.chdir(ROOT)
    line = re.sub(r"\$\{STEPS.*?\}", "", line.replace("$size", size).replace("$seeds", "5"))
    found = Study.of(*read_flags(shlex.split(line.replace("$out", str(tmp_path)))[2:]))
    assert found.control == "matched" and list(found.topks) == [1, 2, 4, 8, 16]
    assert found.comparisons == study(LINES[0], monkeypatch, tmp_path).comparisons
    scales = {
        label: config.router.options.initial_logit_std(config.model.hidden_size)
        for label, config in found.configs.items()
    }
    assert scales["hyper"] == scales["matched"] == scales["topk"] == 1.0


def test_k_goes_no_further_than_groups_of_experts_allow(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{mock_data: true, num_experts: 8, moe_router_topk: 2}")
    (tmp_path / "options.yaml").write_text("topk: {num_groups: 4, group_topk: 3}")
    words = f"--config {tmp_path}/run.yaml --options {tmp_path}/options.yaml --output {tmp_path}/out"
    found = Study.of(*read_flags([*words.split(), "--routers", "topk", "xmoe"]))
    assert list(found.topks) == [1, 2, 4]


def test_scales_of_block_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs = study(LINES[0], monkeypatch, tmp_path).configs
    scales = {
        label: config.router.options.initial_logit_std(config.model.hidden_size)
        for label, config in configs.items()
    }
    assert scales["hyper"] == scales["matched"] == scales["topk"] == 1.0
    assert scales["smoe_dropout"] == pytest.approx(0.16)
    assert scales["paper"] == pytest.approx(0.29, abs=0.01)


def test_the_readme_promises_nothing_that_is_not_there() -> None:
    text = (ROOT / "results/README.md").read_text(encoding="utf-8")
    for block in ("A1", "A1b", "A1c", "A1d", "A2", "A3", "A4", "A5"):
        assert f"\n{block}() {{" in SCRIPT and f"| {block} |" in text
    told = (ROOT / "results/plan_a/claims.md").read_text(encoding="utf-8").splitlines()
    assert len(told) > 8 and all(line in text.splitlines() for line in told)  # what claims.py printed


STAND_IN = """#!/usr/bin/env bash
# mhr that only notes its words, and leaves what later commands look for.
echo "$*" >> calls
words="$*"; output=${words##*--output }; output=${output%% *}
case $1 in
  compare) mkdir -p "$output" ;;
  finetune) mkdir -p "$output"; echo {} > "$output/results.json" ;;
  train) mkdir -p "${words##*--run-dir }" ;;
  evaluate) echo {} > "$output" ;;
  report) echo page > "$output" ;;
esac
"""


def test_every_block_can_be_repeated(tmp_path: Path) -> None:
    """Pages are made of folders that are there, the pages of the first time are none of them, and a finished
    fine-tuning, which refuses its folder, is not asked for again.
    """
    (tmp_path / "results/plan_a").mkdir(parents=True)
    (tmp_path / "examples/tasks").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "results/plan_a/repeat.sh", tmp_path / "results/plan_a")
    for name in ("results/plan_a/data.sh", "results/plan_a/claims.py", "examples/tasks/fetch.sh"):
        (tmp_path / name).write_text("")
    (tmp_path / "bin/mhr").write_text(STAND_IN)
    (tmp_path / "bin/mhr").chmod(0o755)
    calls = []
    for _ in range(2):
        (tmp_path / "calls").unlink(missing_ok=True)
        subprocess.run(
            ["bash", tmp_path / "results/plan_a/repeat.sh", "A1", "A1b", "A1c", "A2", "A3", "A4", "A5"],
            env=os.environ | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"},
            check=True,
        )
        calls.append((tmp_path / "calls").read_text().splitlines())
    pages = [[line.split()[1:] for line in each if line.startswith("report")] for each in calls]
    assert pages[0] == pages[1]
    assert [len(words) - 2 for words in pages[0]] == [1, 1, 1, 4, 1, 15, 2]
    assert all((tmp_path / folder).is_dir() for words in pages[0] for folder in words[:-2])
    tuned = [sum(line.startswith("finetune") for line in each) for each in calls]
    assert tuned == [15, 0]
