"""The settings of the examples are settings that run, and their scripts name files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.routers import ROUTERS

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("name", "ranks", "more"),
    [
        ("quickstart.yaml", 2, ["--data-path", "somewhere"]),
        ("quickstart.yaml", 1, ["--data-path", "somewhere", "--expert-model-parallel-size", "1"]),
        ("cluster.yaml", 64, []),
        ("cluster.yaml", 64, ["--engine", "megatron"]),
    ],
)
def test_settings_are_accepted(name: str, ranks: int, more: list[str]) -> None:
    config = parse(["--config", str(ROOT / "examples" / name), *more], routers=ROUTERS, world_size=ranks)
    assert config.router.name == "hyper"


def test_readme_settings_are_accepted(tmp_path: Path) -> None:
    (block,) = re.findall(
        r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    (tmp_path / "readme.yaml").write_text(block, encoding="utf-8")
    config = parse(["--config", str(tmp_path / "readme.yaml")], routers=ROUTERS, world_size=64)
    assert config.data.data_path[1] == "data/web_text_document"


@pytest.mark.parametrize(
    "document",
    ["README.md", "CONTRIBUTING.md", *(f"examples/{name}.sh" for name in ("quickstart", "cluster", "slurm"))],
)
def test_named_files_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(
        re.findall(
            r"\b((?:tools|examples|tests|benchmarks)/[\w/]+\.(?:py|sh|yaml)|pretrain_gpt_hyperrouter\.py)\b",
            text,
        )
    )
    assert named, document
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
