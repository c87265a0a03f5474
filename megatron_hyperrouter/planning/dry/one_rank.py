"""One rank in a dry run: it joins a fake world and builds the engine."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_hyperrouter.planning.dry.step import take_step

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.planning.dry.storages import Storages


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Measure the memory of this rank; the process cannot be used for anything else afterwards."""
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
    for step in range(steps):  # Adam's state exists from the second step on
        storages.begin(f"step {step + 1}")
        take_step(engine, config)
    return told | {"peaks": storages.peaks, "peak_bytes": max(storages.peaks.values())}


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
