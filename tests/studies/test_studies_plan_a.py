"""The committed study: its settings are accepted, and its comparisons are those of its README."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron_hyperrouter.commands.studies.compare import Study, read_flags

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = (ROOT / "results/plan_a/repeat.sh").read_text(encoding="utf-8").replace("\\\n", " ")
LINES = [line.strip() for line in SCRIPT.splitlines() if line.strip().startswith("mhr compare")]


def study(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Study:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line.replace("$jobs", "1").replace("$out", str(tmp_path)).replace("$k", "4"))
    return Study.of(*read_flags(words[2:]))


@pytest.mark.parametrize("line", LINES, ids=lambda line: re.search(r"(A\d)\.yaml", line)[1])
def test_every_block_is_accepted(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = study(line, monkeypatch, tmp_path)
    assert found.comparisons and all(each.topk in found.topks for each in found.comparisons)
    assert {config.model.num_experts for config in found.configs.values()} == {16}
    if "hyper" in found.configs:
        assert found.control == "matched"  # it needs no other control
        assert "matched_control" not in found.configs


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
    for block in ("A1", "A2", "A3", "A4"):
        assert f"\n{block}() {{" in SCRIPT and f"| {block} |" in text
    assert "has not been run yet" in text
