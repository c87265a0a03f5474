"""Runs a worker file on several CPU ranks, as a launcher would, and returns the answer of rank 0."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from program.launched import Zygote

REPOSITORY = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def environment(**more: str) -> dict[str, str]:
    """This process's environment for a child that imports the project: one thread, no GPU (two ranks cannot
    share one), no leftovers.
    """
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests"), kept.get("PYTHONPATH", "")])
    return (
        kept
        | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
        | more
    )


def meeting_store() -> Any:
    """A store that this process serves and ranks meet at; its ``port`` is bound already, so nobody else can
    take it.
    """
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def run_ranks(
    zygote: Zygote, worker: Path, task: dict[str, Any], *, ranks: int, folder: Path, timeout: float = 300
) -> Any:
    """Fork ``ranks`` processes of ``worker TASK.json ANSWER.json``; rank 0 writes the answer, which is
    returned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    zygote.run(
        [folder / "task.json", folder / "answer.json"],
        program=worker,
        ranks=ranks,
        launched=True,
        timeout=timeout,
    )
    return json.loads((folder / "answer.json").read_text(encoding="utf-8"))


@contextmanager
def world(name: str) -> Iterator[None]:
    """In a rank: a world of its own under ``name``, through DeepSpeed; its end frees the threads of all its
    process groups.
    """
    import deepspeed
    import torch.distributed as dist

    from megatron_hyperrouter.compat.deepspeed import skip_shm_build

    skip_shm_build()  # it would be compiled, behind a lock that a killed process leaves closed
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=ranks)
    deepspeed.init_distributed("gloo", verbose=False)
    try:
        yield
    finally:
        dist.destroy_process_group()


def serve_cases(do: Callable[[dict[str, Any]], Any]) -> None:
    """In a rank started by :func:`run_ranks`: ``do`` each of the task's ``cases`` in a fork of this process
    and a world of its own; rank 0 writes the answers.

    The hosts are imported once, and whatever they keep ends with the case: DeepSpeed's engine is never freed,
    and with it stay 50 threads of process groups a case.
    """
    import torch

    from megatron_hyperrouter.compat.deepspeed import skip_shm_build

    task, answer = (Path(argument) for argument in sys.argv[1:])
    torch.set_num_threads(1)
    skip_shm_build()
    cases = json.loads(task.read_text(encoding="utf-8"))["cases"]
    parts = [answer.with_name(f"{answer.name}.{number}") for number in range(len(cases))]
    for number, case in enumerate(cases):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # makes this fork's pool before threads of autograd race to make it
            with world(str(number)):
                told = do(case)
            if os.environ["RANK"] == "0":
                parts[number].write_text(json.dumps(told), encoding="utf-8")
            return
        _, status = os.waitpid(child, 0)
        if code := os.waitstatus_to_exitcode(status):
            sys.exit(f"case {number}, {case}: exit status {code}")
    if os.environ["RANK"] == "0":
        told = [json.loads(part.read_text(encoding="utf-8")) for part in parts]
        answer.write_text(json.dumps(told), encoding="utf-8")
