"""Runs of the training loop over a fake engine, for its tests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fakes import FakeEngine
from tiny_run import VOCAB_SIZE, splits

from megatron_hyperrouter.checkpoint.folder import find
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.train.hooks import Hook, MetricsHook
from megatron_hyperrouter.train.loop import train
from megatron_hyperrouter.train.metrics import METRICS, Record

TESTS = Path(__file__).parents[1]
TIMES = {metric.name for metric in METRICS if metric.group == "speed"}


class Killed(BaseException):
    """Stands for a SIGKILL where a real one is not needed."""


class KillAt(Hook):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, record: Record) -> None:
        if record["step"] == self.step:
            raise Killed


class Diary(Hook):
    def __init__(self) -> None:
        self.events: list[str] = []

    def on_start(self, step: int) -> None:
        self.events.append(f"start {step}")

    def on_evaluation(self, record: Record) -> None:
        self.events.append(f"{record['split']} {record['step']}")

    def on_save(self, step: int, folder: Path) -> None:
        assert find(folder.parent) == folder  # it is complete by now
        self.events.append(f"save {step}")

    def on_end(self) -> None:
        self.events.append("end")


def run(config: RunConfig, *hooks: Hook, engine: FakeEngine | None = None, data: Any = None) -> FakeEngine:
    engine = engine or FakeEngine(VOCAB_SIZE, topk_at=lambda step: 1 + step // 5)
    metrics = MetricsHook(Path(config.logging.run_dir) / "metrics.jsonl")
    bytes_V = torch.arange(VOCAB_SIZE, dtype=torch.int32)
    train(engine, config, data or splits(), [metrics, *hooks], token_bytes_V=bytes_V)
    return engine


def lines(config: RunConfig, *, timeless: bool = True) -> list[dict[str, Any]]:
    records = [
        json.loads(line) for line in (Path(config.logging.run_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    return [
        {name: value for name, value in record.items() if not timeless or name not in TIMES}
        for record in records
    ]


def change(config: RunConfig, section: str, **values: object) -> RunConfig:
    return replace(config, **{section: replace(getattr(config, section), **values)})
