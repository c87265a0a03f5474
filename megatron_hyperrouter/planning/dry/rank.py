"""Processes that are each one rank of many: build the engine, take two steps, and tell what was alive.

    python -m megatron_hyperrouter.planning.dry.rank < TASKS.json

A line of stdin is a task: ``settings`` (YAML), ``rank``, ``world_size``, ``vocab_size``, ``skew``, and
``steps`` (0: build only).  A line of stdout is its answer: ``parameters``, ``built_bytes``, ``peaks`` by
phase, or ``error``.  Each task has a fork of its own, for a process group is the process's; the imports are
done once.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_hyperrouter.compat.host_logs import silence_hosts

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.planning.dry.storages import Storages


def main() -> None:
    """Tasks from stdin, answers to stdout, in order."""
    silence_hosts()
    warnings.filterwarnings("ignore")  # hosts see fake tensors, and say so at each look
    _import_hosts()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(in_fork(json.loads(line))) + "\n")
        sys.stdout.flush()


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
    return {"rank": task["rank"], "error": f"its process ended with {os.waitstatus_to_exitcode(status)}"}


def _tell(task: dict[str, Any], pipe: int) -> NoReturn:
    """The child's whole life; whatever a host raises in a dry run is an answer."""
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


def run(task: dict[str, Any]) -> dict[str, Any]:
    """What this rank holds; the process is not fit for anything else afterwards."""
    from megatron_hyperrouter.compat.deepspeed import skip_shm_build
    from megatron_hyperrouter.config.cli import load_file
    from megatron_hyperrouter.planning.dry.stand_ins import install
    from megatron_hyperrouter.planning.dry.storages import Storages
    from megatron_hyperrouter.routers import ROUTERS

    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(task["settings"])
        file.flush()
        config = load_file(Path(file.name), routers=ROUTERS, world_size=task["world_size"])
    skip_shm_build()
    storages = Storages(answers=True)
    with contextlib.redirect_stdout(io.StringIO()), fake_world(task["rank"], task["world_size"], config):
        if config.engine.engine == "megatron":
            from megatron_hyperrouter.compat.megatron import install as serve_megatron

            serve_megatron()
        install(config, task["skew"])
        with FakeTensorMode(allow_non_fake_inputs=True), storages:
            return _built_and_stepped(config, task, storages)


def _built_and_stepped(config: RunConfig, task: dict[str, Any], storages: Storages) -> dict[str, Any]:
    from megatron_hyperrouter.engines import open_engine

    engine: Any = open_engine(config, vocab_size=task["vocab_size"], eod=0)
    told = {
        "rank": task["rank"],
        "parameters": sum(parameter.numel() for _, parameter in engine.named_parameters()),
        "built_bytes": storages.now,
    }
    steps = task["steps"]
    for step in range(steps):  # Adam's state is there from the second on
        storages.begin(f"step {step + 1}")
        take_step(engine, config)
    return told | {"peaks": storages.peaks, "peak_bytes": max(storages.peaks.values())}


def take_step(engine: Any, config: RunConfig) -> None:
    """A step on tokens that are not there."""
    from megatron_hyperrouter.config.derived import accumulation_steps
    from megatron_hyperrouter.engines import shared
    from megatron_hyperrouter.engines.base import StepResult

    train, place = config.train, engine.place
    count = accumulation_steps(config, place.world_size)
    tokens_BS = torch.zeros(train.micro_batch_size, config.model.seq_length, dtype=torch.int64)

    def result(own: Any, statistics: Any, *args: Any, **kwargs: Any) -> tuple[StepResult, Any]:
        sums = statistics.take()
        total = torch.cat((own, torch.zeros(1 + place.world_size, dtype=own.dtype), sums.flatten()))
        dist.all_reduce(total)
        return StepResult(1.0, 1.0, 1.0, 1.0, {}, False, 0, ()), sums

    shared.step_result = result  # type: ignore[assignment, attr-defined]
    engine._end_step = lambda step, sums: engine.weights_changed()
    now = shared._Step([(tokens_BS, tokens_BS)] * count, 0, 1e-3, {})
    engine._run(now, lambda: False, lambda result: True)


@contextlib.contextmanager
def fake_world(rank: int, size: int, config: RunConfig) -> Iterator[None]:
    """A process group whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0"}
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    if config.engine.engine == "deepspeed":
        import deepspeed

        deepspeed.init_distributed("fake", verbose=False)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shortened(config: RunConfig, micro_batches: int, data_size: int) -> RunConfig:
    """The same step with no more micro-batches than a pipeline can hold, and with its last k."""
    stages = config.parallel.pipeline_model_parallel_size
    most = 2 * stages if stages > 1 else 2
    batch = min(micro_batches, most) * config.train.micro_batch_size * data_size
    constant = replace(config.topk, topk_schedule="constant", topk_start=None, topk_schedule_steps=None)
    return replace(config, topk=constant, train=replace(config.train, global_batch_size=batch))


if __name__ == "__main__":
    main()
