"""``--profile``: which steps a trace has, and that a trace never ends a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hyperrouter.config.tree import LoggingConfig
from megatron_hyperrouter.engines.profile import Profiler


def profiler(run_dir: Path, **more: int) -> Profiler:
    return Profiler(LoggingConfig(run_dir=str(run_dir), profile=True, **more), rank=0)  # type: ignore[arg-type]


def take(each: Profiler, *steps: int) -> None:
    for step in steps:
        with each.watching(step):
            pass
    each.close()


def test_a_run_that_ends_within_the_trace_writes_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    take(profiler(tmp_path, profile_step_start=1, profile_step_end=9), 1, 2, 3)
    assert (tmp_path / "profile" / "rank-0.json").is_file()
    assert "trace of steps 2 to 3" in capfd.readouterr().out.replace("\n", " ")


def test_a_run_without_a_step_of_the_trace_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    take(profiler(tmp_path), 1, 2)
    told = capfd.readouterr().err.replace("\n", " ")
    assert "--profile wrote no trace: this run took no step from 11 to 12" in told
    take(profiler(tmp_path))  # an engine that only evaluates
    assert not capfd.readouterr().err and not (tmp_path / "profile").exists()


def test_a_trace_that_cannot_be_written_ends_no_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile").touch()
    take(profiler(tmp_path, profile_step_start=0, profile_step_end=1), 1, 2)
    assert "the trace cannot be written" in capfd.readouterr().err
