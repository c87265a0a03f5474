"""A whole run of one second with the fake engine: settings, data, and a program that tests can signal and
kill.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from fakes import FakeDataset, FakeEngine

from megatron_hyperrouter.config.tree import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from megatron_hyperrouter.data.stream.dataset import Splits
from megatron_hyperrouter.train.hooks import Hook
from megatron_hyperrouter.train.loop import train
from megatron_hyperrouter.train.reporters import hooks_for

VOCAB_SIZE = 16


def settings(run_dir: Path) -> RunConfig:
    """12 steps of 4 samples in micro-batches of 2; evaluated every 4 steps, saved every 3."""
    return RunConfig(
        model=ModelConfig(seq_length=8),
        data=DataConfig(num_workers=0),
        optimizer=OptimizerConfig(lr=0.05, lr_warmup_iters=3, lr_decay_style="cosine"),
        train=TrainConfig(
            micro_batch_size=2, global_batch_size=4, train_iters=12, eval_interval=4, eval_iters=2
        ),
        checkpoint=CheckpointConfig(save_interval=3, async_save=False),
        logging=LoggingConfig(run_dir=str(run_dir), log_interval=1),
    )


def splits(train_samples: int = 48) -> Splits:
    """Data that needs no files."""
    train, valid, test = (
        FakeDataset(size, vocab_size=VOCAB_SIZE, seed=seed) for seed, size in enumerate((train_samples, 8, 8))
    )
    return Splits(train, valid, test)


class Slow(Hook):
    """Gives a kill time to come at any moment of a step."""

    def on_step(self, record: object) -> None:
        time.sleep(0.005)


def attempt(config: RunConfig) -> None:
    engine = FakeEngine(VOCAB_SIZE, topk_at=lambda step: 1 + step // 5)
    hooks = [*hooks_for(config, engine.place), Slow()]
    import torch

    train(
        engine,
        config,
        splits(4 * config.train.train_iters),
        hooks,
        token_bytes_V=torch.arange(VOCAB_SIZE, dtype=torch.int32),
    )


def killed_until_done(config: RunConfig) -> int:
    """Kill the run again and again until an attempt comes through; returns how many were killed."""
    # what torch imports late must not be imported again by every child
    warm = config.logging.run_dir + "-warm"
    attempt(replace(config, logging=replace(config.logging, run_dir=warm)))
    moments = random.Random(3)
    for killed in range(100):
        child = os.fork()
        if child == 0:
            sys.stdout = sys.stderr
            attempt(replace(config, checkpoint=replace(config.checkpoint, load=config.logging.run_dir)))
            os._exit(0)
        time.sleep(moments.uniform(0.0, 0.05 * 1.08**killed))
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] == 0:
            return killed
    raise AssertionError("never came through")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--endless", action="store_true")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    config = settings(arguments.run_dir)
    config = replace(config, data=replace(config.data, num_workers=arguments.workers))
    if arguments.endless:
        config = replace(config, train=replace(config.train, train_iters=20_000))
    if arguments.kill:
        print(killed_until_done(config))
    else:
        attempt(config)


if __name__ == "__main__":
    main()
