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
from fakes import FakeEngine
from tiny_run import VOCAB_SIZE, settings, splits
from train.loop_runs import TESTS, lines, run

from megatron_hyperrouter.checkpoint.folder import find, folder_name
from megatron_hyperrouter.engines.base import StepResult
from megatron_hyperrouter.train.loop import train


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of the run that was never stopped."""
    config = settings(tmp_path_factory.mktemp("whole") / "run")
    run(config)
    return lines(config)


class TestSignal:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
    def test_stops_after_the_step_in_which_it_came(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
    ) -> None:
        class Signalled(FakeEngine):
            def train_step(self, batches: Any, *, step: int, **more: Any) -> StepResult:
                if step == 4:
                    os.kill(os.getpid(), number)
                return super().train_step(batches, step=step, **more)

        config = settings(tmp_path / "run")
        assert train(Signalled(VOCAB_SIZE), config, splits(), []) == 5
        folder = find(tmp_path / "run")
        assert folder is not None and folder.name == folder_name(5)
        said = capsys.readouterr().out
        assert f"stopped by {number.name} after step 5; continue with --load {tmp_path / 'run'}" in said

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
