"""docs/definitions.md names code and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "definitions.md").read_text(encoding="utf-8")
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)))
FILES = sorted(set(re.findall(r"`((?:megatron_hyperrouter|tools)/[\w/]+\.py)`", TEXT)))


@pytest.mark.parametrize(("file", "name"), TESTS)
def test_the_test_is_there(file: str, name: str) -> None:
    assert re.search(
        rf"^ *def {name}\(|^(\w+, )*{name} = ", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE
    )


def test_the_files_are_there() -> None:
    assert len(TESTS) > 20 and len(FILES) > 10
    assert [file for file in FILES if not (ROOT / file).is_file()] == []


@pytest.mark.parametrize("section", TEXT.split("\n## ")[1:-1], ids=lambda section: section.split("\n")[0])
def test_every_entry_has_all_its_parts(section: str) -> None:
    assert all(
        part in section
        for part in ("- **In the engines.**", "- **In this program.**", "- **Code.**", "- **Tests.**")
    )
