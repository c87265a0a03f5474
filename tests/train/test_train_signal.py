"""SIGTERM saves and stops; SIGKILL loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed import environment
from tiny_run import settings
from train.loop_runs import TESTS, lines, run

from megatron_hyperrouter.checkpoint.folder import find, folder_name
from megatron_hyperrouter.train.loop import stop_signal


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of the run that was never stopped."""
    config = settings(tmp_path_factory.mktemp("whole") / "run")
    run(config)
    return lines(config)


class TestSignal:
    def test_is_noted_and_the_old_handler_comes_back(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with stop_signal(enabled=True) as request:
            assert not request.came
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.came
        assert signal.getsignal(signal.SIGTERM) == before

    def test_is_left_alone_when_not_asked_for(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with stop_signal(enabled=False):
            assert signal.getsignal(signal.SIGTERM) == before

    @pytest.mark.processes
    @pytest.mark.parametrize(("num_workers", "whole_group"), [(0, False), (1, True)])
    def test_sigterm_saves_and_stops(self, tmp_path: Path, num_workers: int, whole_group: bool) -> None:
        """``whole_group``: launchers send it to the reading processes, too."""
        command = [
            sys.executable,
            str(TESTS / "tiny_run.py"),
            str(tmp_path / "run"),
            "--endless",
            "--workers",
            str(num_workers),
        ]
        trainer = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment(),
        )
        assert trainer.stdout is not None
        for line in trainer.stdout:
            if "step 5/" in line:
                break
        (os.killpg if whole_group else os.kill)(trainer.pid, signal.SIGTERM)
        _, errors = trainer.communicate(timeout=60)
        assert trainer.returncode == 0, errors
        folder = find(tmp_path / "run")
        last = lines(settings(tmp_path / "run"))[-1]["step"]
        assert folder is not None and folder.name == folder_name(last) and last >= 5

    @pytest.mark.processes
    def test_killed_at_random_moments_and_resumed(self, tmp_path: Path, whole: list[dict[str, Any]]) -> None:
        """Real SIGKILLs, also during saves; every attempt is the same command with --load."""
        result = subprocess.run(
            [sys.executable, str(TESTS / "tiny_run.py"), str(tmp_path / "run"), "--kill"],
            check=False, capture_output=True, text=True, timeout=120, env=environment(),
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert int(result.stdout.split()[-1]) >= 5  # attempts that were killed
        assert lines(settings(tmp_path / "run")) == whole
