"""Runs a worker file on several CPU ranks, as a launcher would, and brings back what rank 0 tells."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def environment(**more: str) -> dict[str, str]:
    """This process's environment for a child that imports the project: one thread, no GPU (two ranks cannot share one), no leftovers."""
    kept = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests"), kept.get("PYTHONPATH", "")])
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"} | more


def run_ranks(worker: Path, task: dict[str, Any], *, ranks: int, folder: Path, timeout: float = 300) -> Any:
    """Start ``ranks`` processes of ``worker TASK.json ANSWER.json``; rank 0 writes the answer, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    store = tempfile.mkdtemp(dir=folder)  # a new one: a file store keeps the addresses of ranks that are gone
    (folder / "task.json").write_text(json.dumps(task | {"store": store}), encoding="utf-8")
    port = str(free_port())
    processes, logs = [], []
    for rank in range(ranks):
        env = environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        log = (folder / f"rank{rank}.log").open("w+", encoding="utf-8")
        command = [sys.executable, str(worker), str(folder / "task.json"), str(folder / "answer.json")]
        processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True))
        logs.append(log)
    try:
        _wait(processes, timeout)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    codes = [process.returncode for process in processes]
    if any(codes):
        tails = []
        for rank, log in enumerate(logs):
            log.seek(0)
            tails.append(f"--- rank {rank}, exit status {codes[rank]}\n{log.read()[-3000:]}")
        raise AssertionError("\n".join(tails))
    return json.loads((folder / "answer.json").read_text(encoding="utf-8"))


def _wait(processes: list[subprocess.Popen[bytes]], timeout: float) -> None:
    """Until all have ended, one has failed, or the time is over."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if all(code is not None for code in codes):
            return
        if any(codes):  # one failed: the others would wait for it in a collective
            time.sleep(1.0)
            return
        time.sleep(0.05)
