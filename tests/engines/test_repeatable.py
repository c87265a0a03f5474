"""Two runs of the same settings are equal bit for bit, with eight experts for each token: the sums of their
outputs have a fixed order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from program.launched import Zygote

from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names

pytestmark = pytest.mark.processes
WORKER = Path(__file__).with_name("layout_worker.py")
ENGINES = ("deepspeed", "megatron")
FLAGS = (
    "--router.name hyper --num-experts 16 --moe-router-topk 8 --global-batch-size 4 "
    "--expert-model-parallel-size 2"
).split()


@pytest.fixture(scope="module")
def twice(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Any, Path]]]:
    """What the runs of each engine told, and the folders of their weights."""
    root = tmp_path_factory.mktemp("twice")
    cases = [
        {"flags": ["--engine", engine, *FLAGS], "steps": 3, "folder": str(root / f"{engine}{number}")}
        for engine in ENGINES
        for number in range(2)
    ]
    told = run_ranks(zygote, WORKER, {"cases": cases}, ranks=2, folder=root)
    found: dict[str, list[tuple[Any, Path]]] = {engine: [] for engine in ENGINES}
    for case, answer in zip(cases, told, strict=True):
        folder = Path(str(case["folder"]))
        found[folder.name.rstrip("01")].append((answer["steps"], folder))
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_two_runs_are_equal_bit_for_bit(twice: dict[str, list[tuple[Any, Path]]], engine: str) -> None:
    (steps, first), (steps_again, second) = twice[engine]
    assert steps == steps_again and len({step["lm_loss"] for step in steps}) == len(steps) == 3
    names = weight_names(first)
    assert names == weight_names(second)
    before, after = read_tensors(first, names), read_tensors(second, names)
    assert all(torch.equal(before[name], after[name]) for name in names)
