"""docs/checkpoints.md and docs/faults.md name tests that exist and files that a save writes."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
FAULTS = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")


def test_every_promise_has_a_test_that_exists() -> None:
    table = PAGE.split("## What is guaranteed after a fault")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!fault|-)(.+?) \|.*\| (.+?) \|$", table + FAULTS, re.MULTILINE)
    assert len(rows) >= 35
    known = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))
    }
    for fault, tests in rows:
        named = re.findall(r"`(test_\w+)`", tests)
        assert named and not set(named) - known, (fault, set(named) - known)
