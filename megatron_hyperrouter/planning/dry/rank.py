"""Processes that each play one rank of many: build the engine, take two steps, and report the live memory.

    python -m megatron_hyperrouter.planning.dry.rank < TASKS.json

A line of stdin is a task: ``settings`` (YAML), ``rank``, ``world_size``, ``vocab_size``, ``skew``, and
``steps`` (0: build only).  A line of stdout is its answer: ``parameters``, ``built_bytes``, ``peaks`` by
phase, or ``error``.  Each task runs in a separate fork, because a process can have one process group;
modules are imported only once.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from importlib import import_module
from typing import Any, NoReturn

import torch

from megatron_hyperrouter.compat.host_logs import silence_hosts
from megatron_hyperrouter.planning.dry.one_rank import run


def main() -> None:
    """Read tasks from stdin and write the answers to stdout in the same order."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of the hosts is not part of the answer
    silence_hosts()
    warnings.filterwarnings("ignore")  # hosts warn about fake tensors at every access
    _import_hosts()
    torch.compiler.set_stance("force_eager")  # a compiled kernel cannot take fake tensors
    for line in sys.stdin:
        answers.write(json.dumps(in_fork(json.loads(line))) + "\n")
        answers.flush()


def in_fork(task: dict[str, Any]) -> dict[str, Any]:
    """The answer to a task, from a fork of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _tell(task, writing)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        answer: dict[str, Any] = json.loads(text)
        return answer
    return {
        "rank": task["rank"],
        "error": (f"its process ended with exit status {os.waitstatus_to_exitcode(status)}"),
    }


def _tell(task: dict[str, Any], pipe: int) -> NoReturn:
    """Run the task in the child and write the answer; an error of a host is an answer, too."""
    told: dict[str, Any] = {"rank": task["rank"]}
    try:
        told = run(task)
    finally:
        if (error := sys.exc_info()[1]) is not None:
            told["error"] = f"{type(error).__name__}: {error}"[:2000]
            traceback.print_exc()
        os.write(pipe, json.dumps(told).encode())
        os._exit(0)


def _import_hosts() -> None:
    for name in (
        "torch._dynamo",
        "megatron_hyperrouter.engines.deepspeed.engine",
        "megatron_hyperrouter.engines.megatron.engine",
    ):
        import_module(name)


if __name__ == "__main__":
    main()
