"""One run at a time in a run folder: rank 0 locks a file in it, and the file says which run that is.

The lock is the kernel's, so it ends with the process. On a file system without locks, the file's
modification time is used instead: the run renews it, and a run whose file is older than ``STALE`` has
ended. Both times are those of the file server.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

from megatron_hyperrouter import files
from megatron_hyperrouter.errors import ConfigError, Problem

LOCK, HOLDER = ".run.lock", ".run.json"
BEAT, STALE = 10.0, 60.0  # seconds
_TRIES, _PAUSE = 4, 0.05  # seconds
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class RunLock:
    """Held from ``with`` to its end; ConfigError, with the holder, where another run has the folder."""

    def __init__(self, run_dir: Path, *, held: bool = True) -> None:
        """``held``: False on the ranks that leave it to rank 0."""
        self._folder, self._held = run_dir, held
        self._lock: int | None = None
        self._made_folder = False
        self._ended = threading.Event()

    def __enter__(self) -> RunLock:
        if self._held:
            try:
                self._take()
            except OSError as error:
                raise ConfigError(
                    [
                        Problem(
                            "--run-dir",
                            self._folder,
                            f"cannot be written ({error.strerror})",
                            "choose another folder",
                        )
                    ]
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._held:
            with contextlib.suppress(OSError):
                (self._folder / HOLDER).unlink()
            if error is not None and self._made_folder:
                self._remove_unused_folder()
        if self._lock is not None:
            os.close(self._lock)  # lets go

    def _take(self) -> None:
        self._made_folder = not self._folder.exists()
        try:
            while not self._lock_file():
                pass
        except BlockingIOError:
            raise self._taken() from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self._take_without_locks()
            return
        self._write()

    def _lock_file(self) -> bool:
        """Open and lock the file; False if the run that had it has just removed it with the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            file = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            self._lock = file
            self._lock_now(file)
            if os.path.samestat(os.fstat(file), os.stat(self._folder / LOCK)):
                return True
            os.close(file)
        return False

    def _remove_unused_folder(self) -> None:
        """Leave no new folder behind if the run was refused before it wrote anything."""
        with contextlib.suppress(OSError):
            if os.listdir(self._folder) == [LOCK]:
                (self._folder / LOCK).unlink()
                self._folder.rmdir()

    @staticmethod
    def _lock_now(file: int) -> None:
        """Try for a short time, because :func:`is_held` takes the lock for an instant."""
        for _ in range(_TRIES - 1):
            with contextlib.suppress(BlockingIOError):
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(_PAUSE)
        return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _take_without_locks(self) -> None:
        age = self._age()
        if age is not None and age < STALE:
            raise self._taken()
        self._write()
        threading.Thread(target=self._renew, name="run-lock", daemon=True).start()

    def _renew(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):  # the file server may be unreachable for a while
                os.utime(self._folder / HOLDER)

    def _age(self) -> float | None:
        """Seconds since the holder was last seen; None if there is none."""
        try:
            seen = (self._folder / HOLDER).stat().st_mtime
        except FileNotFoundError:
            return None
        with tempfile.NamedTemporaryFile(dir=self._folder) as now:
            return os.fstat(now.fileno()).st_mtime - seen

    def _write(self) -> None:
        job = next((f"{name}={os.environ[name]}" for name in _JOBS if name in os.environ), "")
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": job,
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        files.write_text(self._folder / HOLDER, json.dumps(holder) + "\n")

    def _taken(self) -> ConfigError:
        who = "another run"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            holder = json.loads((self._folder / HOLDER).read_text(encoding="utf-8"))
            job = f", job {holder['job']}" if holder["job"] else ""
            who = f"a run on {holder['host']}, process {holder['pid']}{job}, since {holder['since']}"
        rule = f"is in use by {who}"
        return ConfigError(
            [
                Problem(
                    "--run-dir",
                    self._folder,
                    rule,
                    ("wait for that run, stop it, or choose another --run-dir"),
                )
            ]
        )


def is_held(run_dir: Path) -> bool | None:
    """Whether a run is using the folder now, as far as this machine can see; None if it cannot.

    It only reads, so users without write access to the folder can call it.
    """
    try:
        file = os.open(run_dir / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks here
        return None
    finally:
        os.close(file)  # lets go
    return False


def holder_of(run_dir: Path) -> dict[str, object]:
    """The run that locked the folder last and has not released it: host, pid, job, since; empty if there
    is none.
    """
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads((run_dir / HOLDER).read_text(encoding="utf-8"))
        if isinstance(holder, dict):
            return holder
    return {}
