"""Starts the ranks of mhr verify on this machine, or joins them under a launcher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_hyperrouter.errors import HyperRouterError
from megatron_hyperrouter.files import check_folder
from megatron_hyperrouter.processes import child_environment
from megatron_hyperrouter.terminal import counted
from megatron_hyperrouter.verify.rank import World, run_cases

if TYPE_CHECKING:
    from torch.distributed import Store

WORKER = ("-m", "megatron_hyperrouter.verify.rank")
Cases = Sequence[dict[str, Any]]


class Starter(Protocol):
    """What runs cases, and where they leave their weights."""

    folder: Path
    is_main: bool  # one process judges

    def run(self, cases: Cases, ranks: int) -> list[dict[str, Any]]:
        """Run the cases on this number of ranks; returns the results, on the main process."""
        ...

    def close(self) -> None:
        """Remove what the runs left."""
        ...


class Here:
    """All ranks are processes of this machine, which the tool starts itself."""

    def __init__(self, folder: Path | None, *, timeout: float, most_ranks: int) -> None:
        """``most_ranks``: of the largest layout; GPUs are used where there is one for each."""
        self.timeout = timeout
        self.on_gpus = _gpus() >= most_ranks
        self.folder = _fresh(folder)
        self.is_main = True

    def run(self, cases: Cases, ranks: int) -> list[dict[str, Any]]:
        """Start ``ranks`` processes, wait, and return the results of rank 0; if a rank fails, the end of
        its log is the error.
        """
        task, answer = self.folder / f"task-{ranks}.json", self.folder / f"answer-{ranks}.json"
        task.write_text(json.dumps({"timeout": self.timeout, "cases": cases}), encoding="utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        common = child_environment(
            WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, PYTHONWARNINGS="ignore"
        )
        common.setdefault("OMP_NUM_THREADS", "1")
        if not self.on_gpus:
            common["CUDA_VISIBLE_DEVICES"] = ""
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                with (self.folder / f"log-{ranks}-{rank}").open("wb") as log:
                    command = [sys.executable, *WORKER, str(task), str(answer)]
                    own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    processes.append(
                        subprocess.Popen(
                            command, env=own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                        )
                    )
            codes = _wait(processes, time.monotonic() + self.timeout)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if any(code != 0 for code in codes):
            raise self._failure(codes)
        told: list[dict[str, Any]] = json.loads(answer.read_text(encoding="utf-8"))
        return told

    def _failure(self, codes: Sequence[int | None]) -> HyperRouterError:
        """``codes``: exit statuses of the ranks when the first one failed or when the time was over; None for
        a rank that was still running.
        """
        # A rank that was left alone fails as well, but later: it says less than the one that fell first
        guilty = next((rank for rank, code in enumerate(codes) if code), None)
        runs = f"a run on {counted(len(codes), 'rank')}"
        if guilty is None:
            guilty = codes.index(None)
            message, remedy = f"{runs} did not end within {self.timeout:g} s", "give a larger --timeout"
        else:
            message = f"{runs} failed: rank {guilty} ended with exit status {codes[guilty]}"
            remedy = "correct what this log reports, then run the same command again"
        log = self.folder / f"log-{len(codes)}-{guilty}"
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:].rstrip()
        return HyperRouterError(f"{message}\n--- end of the log of rank {guilty}\n{tail}\n---", remedy=remedy)

    def close(self) -> None:
        """Remove what the runs left."""
        shutil.rmtree(self.folder)


class Launched:
    """This process is one rank of a launcher's; the first ranks of them run each layout, through the
    launcher's own store.
    """

    def __init__(
        self, folder: Path | None, *, timeout: float, environ: Mapping[str, str] = os.environ
    ) -> None:
        """``folder``: must be visible on all nodes."""
        from torch.distributed.rendezvous import rendezvous

        self.rank, self.size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        self.is_main = self.rank == 0
        self.patience = timedelta(seconds=timeout)
        self.store: Store = next(rendezvous("env://", self.rank, self.size, timeout=self.patience))[0]
        self.store.set(f"verify-gpu-{self.rank}", str(int(_gpus() > int(environ.get("LOCAL_RANK", "0")))))
        if not all(self._wait_for(f"verify-gpu-{rank}") == "1" for rank in range(self.size)):
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all on the CPU, so that they can be compared
        if self.is_main:
            self.store.set("verify-folder", str(_fresh(folder or Path("runs"))))
        self.folder = Path(self._wait_for("verify-folder"))
        if not self.folder.is_dir():
            raise _not_shared(self.folder)

    def run(self, cases: Cases, ranks: int) -> list[dict[str, Any]]:
        """Run them if this rank is among the first ``ranks``; the main rank waits until all of those are
        through.
        """
        told: list[dict[str, Any]] = []
        if self.is_main:
            self.store.set(f"verify-start-{ranks}", "1")  # the settings of the cases are written
        if self.rank < ranks:
            self._wait_for(f"verify-start-{ranks}")
            os.environ["WORLD_SIZE"] = str(ranks)
            told = run_cases(cases, World(self.rank, ranks, self.store, self.patience))
            self.store.set(f"verify-done-{ranks}-{self.rank}", "1")
        if self.is_main:
            for rank in range(ranks):
                self._wait_for(f"verify-done-{ranks}-{rank}")
        return told

    def close(self) -> None:
        """Remove what the runs left."""
        if self.is_main:
            shutil.rmtree(self.folder)

    def _wait_for(self, key: str) -> str:
        self.store.wait([key], self.patience)
        value: bytes = self.store.get(key)
        return value.decode()


def _fresh(folder: Path | None) -> Path:
    if folder is not None:
        check_folder(folder, "--folder")
        folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="verify_layouts-", dir=folder)).resolve()


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _wait(processes: Sequence[subprocess.Popen[bytes]], end: float) -> list[int | None]:
    """Wait until all have ended, one has failed, or the time is over; returns their exit statuses."""
    while True:
        codes = [process.poll() for process in processes]
        if all(code is not None for code in codes) or any(codes) or time.monotonic() >= end:
            return codes
        time.sleep(0.1)


def _not_shared(folder: Path) -> Exception:
    from megatron_hyperrouter.errors import ConfigError, Problem

    return ConfigError(
        [
            Problem(
                "--folder",
                folder,
                f"is not visible on {socket.gethostname()}",
                "give a folder that all nodes share",
            )
        ]
    )
