"""``mhr doctor`` as a rank of a job, with faults put in: FAULTS in the environment names them, for one rank.

examined.py [flags of doctor]
"""

from __future__ import annotations

import fcntl
import itertools
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from megatron_hyperrouter.commands.cluster.doctor import main
from megatron_hyperrouter.doctor import folder, machine, network
from megatron_hyperrouter.terminal import run_tool


def other_version() -> None:
    """A library of another version is found first."""
    info = Path.cwd() / "other" / "numpy-0.0.1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.0.1\n")
    sys.path.insert(0, str(info.parent))


def no_extension() -> None:
    sys.modules["megatron_hyperrouter.data._index"] = None  # type: ignore[assignment]


def wrong_clock() -> None:
    true = time.time
    time.time = lambda: true() + 5.0


def few_open_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def slow() -> None:
    fast = machine.matmul_rate
    machine.matmul_rate = lambda: fast() / 5


def not_shared() -> None:
    """A relative --run-dir leads elsewhere on this rank."""
    (Path.cwd() / "elsewhere").mkdir(exist_ok=True)
    os.chdir("elsewhere")


def torn_renames() -> None:
    """As an object store does it: the old file is emptied, then filled."""

    def replace(source: Path, target: Path) -> None:
        content = source.read_text()
        with target.open("w") as file:
            time.sleep(0.002)
            file.write(content)

    folder.os = type("Os", (), {**vars(os), "replace": staticmethod(replace)})  # type: ignore[assignment]


def own_locks() -> None:
    """As NFS with local locks: every lock is free on another machine."""
    fcntl.flock = lambda *_: None


def closed_ports() -> None:
    true = network._connect
    network._connect = lambda host, port: "Connection refused" if port else true(host, port)


def disturbed() -> None:
    """Other work on the machine makes the first exchanges of this rank slow."""
    true, calls = network._exchange, itertools.count()

    def exchange(*words: Any) -> None:
        time.sleep(0.3 if next(calls) < 8 else 0.0)
        true(*words)

    network._exchange = exchange


def no_exchange() -> None:
    def measure(*_: object) -> None:
        raise RuntimeError("NCCL error: unhandled system error")

    network._measure = measure  # type: ignore[assignment]


def full_disk() -> None:
    """Nothing larger than a few kilobytes can be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


if __name__ == "__main__":
    machine._MATMUL_SECONDS, folder.WAIT, folder._BLOCKS = 0.1, 1.0, 1
    seeded: dict[str, Any] = {name: each for name, each in globals().items() if callable(each)}
    for word in filter(None, sys.argv.pop(1).split(",")):
        name, _, rank = word.partition("@")
        if rank == os.environ.get("RANK"):
            seeded[name]()
    run_tool(main)
