"""One rank of the tests that look inside a DeepSpeed run: what it generates, keeps, updates and is configured
with.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from engines.layout_worker import VOCABULARY, micro_batches, step_numbers, tiny_config

from megatron_hyperrouter.compat.deepspeed import skip_shm_build
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines import open_engine
from megatron_hyperrouter.ops import keyed
from megatron_hyperrouter.routers import hyper
from megatron_hyperrouter.routers.frozen import FrozenRouter


class Calls:
    """Counts how often the hypernetwork runs, forwards and back."""

    def __init__(self) -> None:
        self.forwards = self.backwards = 0
        generate, transposed = hyper.generate, hyper.transposed

        def counted_generate(*args: Any, **kwargs: Any) -> Any:
            self.forwards += 1
            return generate(*args, **kwargs)

        def counted_transposed(*args: Any, **kwargs: Any) -> Any:
            self.backwards += 1
            return transposed(*args, **kwargs)

        hyper.generate, hyper.transposed = counted_generate, counted_transposed  # type: ignore[assignment]

    def take(self) -> list[int]:
        """(forwards, backwards) since the last call."""
        taken = [self.forwards, self.backwards]
        self.forwards = self.backwards = 0
        return taken


def digests(engine: Any) -> list[str]:
    """Of the frozen tensors that the routers really compute with."""
    found = [router for router in engine.routers.values() if isinstance(router, FrozenRouter)]
    return [keyed.digest(router.frozen_tensors(torch.device("cpu"))) for router in found]


def elements_kept(engine: Any) -> tuple[int, int]:
    """(numbers that the optimizer keeps a first moment of, numbers that it was given), both on this rank."""
    inner = getattr(engine.host.optimizer, "optimizer", engine.host.optimizer)
    moments = sum(state["exp_avg"].numel() for state in inner.state.values() if "exp_avg" in state)
    return moments, sum(parameter.numel() for group in inner.param_groups for parameter in group["params"])


def look_inside(flags: list[str], world_size: int, calls: Calls) -> dict[str, Any]:
    """Three steps with an evaluation after the first."""
    config: RunConfig = tiny_config(flags, world_size)
    engine: Any = open_engine(config, vocab_size=VOCABULARY)
    try:
        embeddings = {
            name: parameter for name, parameter in engine.named_parameters() if name.endswith("embedding_S")
        }
        before = {name: parameter.detach().clone() for name, parameter in embeddings.items()}
        calls.take()
        told: dict[str, Any] = {"digests": [digests(engine)], "calls": [], "steps": []}
        for step in range(3):
            told["steps"].append(step_numbers(engine, config, step))
            told["calls"].append(calls.take())
            if step == 0:
                engine.evaluate(micro_batches(config, engine.place, 99), topk=2)
                told["calls_of_evaluation"] = calls.take()
        told["digests"].append(digests(engine))
        told["moved"] = {
            name: float((parameter.detach() - before[name]).abs().max())
            for name, parameter in embeddings.items()
        }
        told["trained"] = sum(parameter.numel() for _, parameter in engine.named_parameters())
        told["kept"], told["given"] = elements_kept(engine)
        host = engine.host
        told["settings"] = {
            "bucket": host.zero_reduce_bucket_size(),
            "clip": host.gradient_clipping(),
            "stage": host.zero_optimization_stage(),
        }
    finally:
        engine.close()
    return told


def main() -> None:
    """All cases of the task, each in a world of its own."""
    task, answer = (Path(argument) for argument in sys.argv[1:])
    torch.set_num_threads(1)
    skip_shm_build()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    told, calls = [], Calls()
    for number, flags in enumerate(json.loads(task.read_text(encoding="utf-8"))):
        store = f"file://{task}-world-{number}"
        deepspeed.init_distributed(
            "gloo", False, verbose=False, init_method=store, rank=rank, world_size=world_size
        )
        told.append(look_inside(flags, world_size, calls))
        torch.distributed.destroy_process_group()
    if rank == 0:
        answer.write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()
