"""Checkpoints for tests: two small files each."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

from fakes import Alone

from megatron_hyperrouter.checkpoint.folder import (
    CheckpointFolders,
)

REPOSITORY = Path(__file__).parents[2]


def write_two_files(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 20)
    (folder / "optimizer").mkdir()
    (folder / "optimizer" / "state.bin").write_bytes(b"state")


def saved(root: Path, *steps: int, keep: int = 0) -> CheckpointFolders:
    folders = CheckpointFolders(root, Alone(), keep=keep)
    for step in steps:
        folders.save(step, write_two_files, {"hidden_size": 8, "step": step})
    return folders


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
