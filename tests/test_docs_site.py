"""The documentation builds as a site without a warning, and quotes messages that the code has."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.processes
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "build_router" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if f": {page.name}\n" not in navigation] == []


def test_common_messages_are_the_programs_own() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = page.split("## Ten common messages")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(messages) == 10
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "megatron_hyperrouter").rglob("*.py"))
    plain = re.sub(r"\"\s*\n\s*f?\"", "", code)  # messages that continue on the next line
    formed = {"must be divisible by --expert-model-parallel-size": "indivisible("}  # made of flag and size
    missing = [words for words in messages if formed.get(words, words) not in plain]
    assert missing == []


def test_every_exit_status_is_explained() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\d) \|", page, re.MULTILINE) == list("0123456")
