"""One run at a time in a run folder, with locks of the file system and without."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from distributed import environment

from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.guard import run_lock
from megatron_hyperrouter.guard.run_lock import HOLDER, RunLock, holder_of, is_held

HOLDS = """
import sys, time
from pathlib import Path
from megatron_hyperrouter.guard.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_refused_until_it_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(SLURM_JOB_ID="41"))
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    with pytest.raises(ConfigError, match=rf"is in use by a run on .*process {other.pid}.*SLURM_JOB_ID=41"):
        RunLock(tmp_path).__enter__()
    assert is_held(tmp_path) is True and holder_of(tmp_path)["pid"] == other.pid
    with RunLock(tmp_path, held=False):  # a rank that leaves it to rank 0
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert is_held(tmp_path) is False and holder_of(tmp_path)["pid"] == other.pid
    with RunLock(tmp_path):
        assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()
    assert not (tmp_path / HOLDER).exists() and holder_of(tmp_path) == {}
    assert is_held(tmp_path / "nowhere") is False


def test_a_refused_run_leaves_no_new_folder(tmp_path: Path) -> None:
    new, own, used = tmp_path / "runs" / "new", tmp_path / "own", tmp_path / "used"
    own.mkdir()
    for folder in (new, own, used):
        with contextlib.suppress(ValueError), RunLock(folder):
            if folder == used:
                (folder / "config.yaml").touch()
            raise ValueError("refused")
    assert not new.exists() and own.exists() and (used / "config.yaml").exists()
    with RunLock(new):  # a run that ends well keeps its folder
        pass
    assert new.exists()


def test_a_lock_on_a_removed_file_does_not_count(tmp_path: Path) -> None:
    """A refused run removes its folder while the next run waits for the lock."""
    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / run_lock.LOCK).open("w") as refused:
        fcntl.flock(refused, fcntl.LOCK_EX)

        def remove() -> None:
            (folder / run_lock.LOCK).unlink()
            folder.rmdir()
            fcntl.flock(refused, fcntl.LOCK_UN)

        threading.Timer(run_lock._PAUSE, remove).start()
        with RunLock(folder):
            assert (folder / HOLDER).exists() and is_held(folder) is True


def test_asking_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    """Whoever asks has the lock for an instant."""
    (tmp_path / run_lock.LOCK).touch()
    with (tmp_path / run_lock.LOCK).open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(run_lock._PAUSE, lambda: fcntl.flock(asking, fcntl.LOCK_UN)).start()
        with RunLock(tmp_path):
            assert is_held(tmp_path) is True


def test_where_there_are_no_locks_the_time_of_the_holder_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    with RunLock(tmp_path):
        first = (tmp_path / HOLDER).stat().st_mtime_ns
        with pytest.raises(ConfigError, match="is in use by"):
            RunLock(tmp_path).__enter__()
        for _ in range(100):
            if (tmp_path / HOLDER).stat().st_mtime_ns > first:
                break
            time.sleep(0.05)
        assert (tmp_path / HOLDER).stat().st_mtime_ns > first, "the holder is seen again and again"
    (tmp_path / HOLDER).write_text("{}")
    os.utime(tmp_path / HOLDER, (time.time() - 90, time.time() - 90))  # of a run that was killed
    with RunLock(tmp_path):
        pass


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / run_lock.LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match="cannot be written"):
        RunLock(tmp_path / "run").__enter__()
