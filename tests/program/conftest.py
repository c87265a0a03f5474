"""Fixtures of the program tests: token files, and one run that was never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
from program.launched import Zygote, metrics
from program.settings import RANKS, flags_of, write_text


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a byte-level corpus."""
    return write_text(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="session")
def whole(zygote: Zygote, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run on two ranks that nothing stopped."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    zygote.run(flags_of(text, run_dir), ranks=RANKS)
    assert metrics(run_dir)
    return run_dir
