"""How an error ends a run under the watchdog."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_hyperrouter import console
from megatron_hyperrouter.errors import DataError
from megatron_hyperrouter.guard.supervision import Supervision

LOST = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1")


def leave(error: Exception, *, signalled: bool, folder: Path) -> tuple[BaseException, list[str]]:
    """What leaves the watch where ``error`` enters it, after the launcher's SIGTERM or without; events."""
    told: list[str] = []
    config: Any = SimpleNamespace(
        train=SimpleNamespace(exit_on_signal=True), logging=SimpleNamespace(run_dir=str(folder))
    )
    engine: Any = SimpleNamespace(place=SimpleNamespace(rank=0, is_main=True))
    watch = Supervision()
    with (
        pytest.raises(BaseException) as raised,
        watch.signals(config),
        watch.recording_failures(config, engine, lambda event, *_, **__: told.append(event)),
    ):
        if signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        raise error
    return raised.value, told


def test_a_rank_that_the_launcher_ends_leaves_the_word_to_the_one_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signal can arrive before this rank sees that the other one is gone; a traceback is no help then."""
    left, told = leave(LOST, signalled=True, folder=tmp_path)
    assert isinstance(left, console.EndedByLauncher) and told == ["failure"]
    assert capsys.readouterr().err == "warning: this rank stops because another rank has failed\n"


@pytest.mark.parametrize(
    ("error", "signalled"),
    [(LOST, False), (DataError("a.bin is cut"), True), (DataError("a.bin is cut"), False)],
)
def test_every_other_error_leaves_as_it_came(error: Exception, signalled: bool, tmp_path: Path) -> None:
    left, told = leave(error, signalled=signalled, folder=tmp_path)
    assert left is error and told == ["failure"]
