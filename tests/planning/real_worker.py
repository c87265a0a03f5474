"""One gloo rank that counts the bytes of all tensors alive: after the build of the engine, and in two steps.

A case is flags of the program; rank 0 tells the numbers of all ranks: ``parameters``, ``built_bytes``,
``peaks`` by phase, and ``skew``, the most rows that came to this rank's experts over those that it sent.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed import world

from megatron_hyperrouter.compat.deepspeed import skip_shm_build
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.config.derived import accumulation_steps
from megatron_hyperrouter.engines import grouped, open_engine
from megatron_hyperrouter.planning.dry.storages import Storages
from megatron_hyperrouter.routers import ROUTERS, frozen

VOCABULARY = 1001


def settled(storages: Storages) -> int:
    """The live bytes without those of a finished collective, whose tensors a thread of gloo may hold a
    moment longer than its caller: 138 bytes for ``all_gather_object`` of the groups of an optimizer.
    """
    while True:
        before = storages.now
        time.sleep(0.2)
        if storages.now == before:
            return before


def measured(flags: list[str], world_size: int) -> dict[str, Any]:
    """The case on this rank."""
    config = parse(flags, routers=ROUTERS, world_size=world_size)
    skews = [1.0]
    true_counts = grouped.row_counts

    def counted(counts_NL: torch.Tensor, coming_NL: torch.Tensor) -> tuple[list[int], list[int]]:
        go, come = true_counts(counts_NL, coming_NL)
        skews.append(sum(come) / sum(go))
        return go, come

    grouped.row_counts = counted
    gc.collect()
    frozen._ALIVE.clear()  # a case before this one may have drawn the same hypernetworks
    storages = Storages(answers=False)
    with storages:
        engine: Any = open_engine(config, vocab_size=VOCABULARY, eod=0)
        told: dict[str, Any] = {
            "rank": dist.get_rank(),
            "parameters": sum(parameter.numel() for _, parameter in engine.named_parameters()),
            "built_bytes": settled(storages),
        }
        train = config.train
        count = accumulation_steps(config, world_size)
        torch.manual_seed(dist.get_rank())
        tokens = torch.randint(0, VOCABULARY, (train.micro_batch_size, config.model.seq_length))
        for step in range(2):
            storages.begin(f"step {step + 1}")
            engine.train_step(iter([(tokens, tokens)] * count), step=step, learning_rate=1e-4)
    engine.close()
    grouped.row_counts = true_counts
    return told | {"peaks": storages.peaks, "skew": max(skews)}


def main() -> None:
    """All cases of the task, each in a world of its own."""
    task, answer = (Path(argument) for argument in sys.argv[1:])
    torch.set_num_threads(1)
    skip_shm_build()
    ranks = int(os.environ["WORLD_SIZE"])
    told = []
    for number, flags in enumerate(json.loads(task.read_text(encoding="utf-8"))["cases"]):
        with world(str(number)):
            own = measured(flags, ranks)
            all_ranks: list[Any] = [None] * ranks
            dist.all_gather_object(all_ranks, own)
        told.append(all_ranks)
    if os.environ["RANK"] == "0":
        answer.write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()
