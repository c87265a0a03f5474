"""Measure how long training waits for an asynchronous save, relative to a plain copy of the saved
tensors.

    python benchmarks/checkpoint/save.py        both engines, 60 M parameters, about a minute on one core
    torchrun --nproc_per_node 2 benchmarks/checkpoint/save.py --engine megatron

After each save of the training loop (``train.saving``), the benchmark repeats only the copies: from the
same tensors into the same memory.  It divides the time that the save makes the training wait by the time
of these copies, and shows the median of the ratios.  Times are CPU seconds of the main thread, which does
the copies on a CPU.  With ``--wall``, they are wall times, which other work on the machine disturbs.
Each save is complete before the next save begins, as in a run with enough time between its saves.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.engines import open_engine
from megatron_hyperrouter.engines.base import Engine
from megatron_hyperrouter.engines.saved.state import Memory
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.train.saving import Saving

GOAL = 1.05
SIZES = (
    "--num-layers 2 --hidden-size 1024 --num-attention-heads 8 --moe-ffn-hidden-size 2048 --num-experts 4 "
    "--moe-router-topk 2 --router.name hyper --router.hypernet-width 16 --seq-length 32 --micro-batch-size 1 "
    "--train-iters 1000 --lr 1e-4 --tokenizer-type NullTokenizer --vocab-size 8000 --data-path unused"
).split()


def main() -> None:
    """Measure one engine in this process, or each in a separate process."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--engine", choices=("deepspeed", "megatron"))
    flags.add_argument("--saves", type=int, default=15, metavar="N")
    flags.add_argument(
        "--wall", action="store_true", help="measure wall time instead of the CPU time of the main thread"
    )
    flags.add_argument("more", nargs="*", help="flags of mhr train, written after --")
    args = flags.parse_args()
    if args.engine is None:
        for engine in ("deepspeed", "megatron"):
            subprocess.run([sys.executable, __file__, "--engine", engine, *sys.argv[1:]], check=True)
        return
    measure(args.engine, args.saves, time.perf_counter if args.wall else time.thread_time, args.more)


def measure(name: str, saves: int, clock: Callable[[], float], more: list[str]) -> None:
    """Save so often, and print the ratio."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    with tempfile.TemporaryDirectory() as folder:
        words = [*SIZES, "--engine", name, "--run-dir", os.environ.get("SAVE_DIR", folder), *more]
        words += ["--global-batch-size", os.environ.get("WORLD_SIZE", "1")]
        config = parse(words, routers=ROUTERS, world_size=int(os.environ.get("WORLD_SIZE", "1")))
        engine = open_engine(config, vocab_size=config.data.vocab_size or 8000)
        take_a_step(engine)
        memory = engine._memory = Remembering()
        saving = Saving(
            engine, config, texts={}, meta=lambda step: {}, saved=lambda *told: None, remedy=lambda: ""
        )
        waits, copies = [], []
        for step in range(1, saves + 3):
            memory.made.clear()
            begin = clock()
            saving.save(step)
            waits.append(clock() - begin)
            saving.settle(step)
            copies.append(copy_alone(memory.made, clock))
            if engine.place.is_main:
                for path in (Path(config.logging.run_dir) / "checkpoints").glob("step_*"):
                    subprocess.run(["rm", "-r", str(path)], check=True)
        if engine.place.is_main:
            pairs = [wait / copy for wait, copy in zip(waits[2:], copies[2:], strict=True)]  # memory is made
            ratio = statistics.median(pairs)
            low, *_, high = statistics.quantiles(pairs, n=4)
            print(
                f"{name}: waits {1e3 * statistics.median(waits[2:]):.1f} ms, a plain copy "
                f"{1e3 * statistics.median(copies[2:]):.1f} ms: ratio {ratio:.3f} ({low:.3f} to {high:.3f}), "
                f"goal {GOAL} {'met' if ratio <= GOAL else 'missed'}"
            )
        engine.close()


class Remembering(Memory):
    """Knows what a save has copied, and where to."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Tensor, Tensor]] = []

    def start(self) -> None:
        """Begin all copies that are due."""
        self.made += self.due
        super().start()


def take_a_step(engine: Engine) -> None:
    """So that the optimizer has its state."""
    tokens_BS = torch.zeros((1, 32), dtype=torch.int64)
    engine.train_step(iter([(tokens_BS, tokens_BS)]), step=0, learning_rate=1e-4)


def copy_alone(pairs: list[tuple[Tensor, Tensor]], clock: Callable[[], float]) -> float:
    """Seconds to make the same copies once more."""
    begin = clock()
    for kept, tensor in pairs:
        kept.copy_(tensor)
    return clock() - begin


if __name__ == "__main__":
    main()
