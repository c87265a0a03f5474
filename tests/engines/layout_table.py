"""Runs a table of layouts, each in a few steps on the same tokens, and compares one with another."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from distributed import run_ranks

from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names

WORKER = Path(__file__).with_name("layout_worker.py")
# k = 1, 2, 4 of 4 experts, two steps each; Adam's epsilon keeps rounding noise in tiny gradients from becoming whole steps.
COMMON = "--moe-router-topk 4 --topk-start 1 --topk-schedule multistep --topk-schedule-steps 6 --adam-eps 1e-4".split()
STEPS = 6


class Layout(NamedTuple):
    """Ranks, and the flags that lay the run out over them."""

    ranks: int
    flags: str


class Run(NamedTuple):
    """What a run told, and where its final weights are."""

    told: dict[str, Any]
    weights: Path


def run_table(rows: Iterable[tuple[str, str, Layout]], root: Path, *, more: str = "") -> dict[tuple[str, str], Run]:
    """``rows``: (router, name, layout).  All rows with as many ranks run in one start of those ranks."""
    found: dict[tuple[str, str], Run] = {}
    by_ranks: dict[int, list[tuple[str, str, str]]] = {}
    for router, name, layout in rows:
        by_ranks.setdefault(layout.ranks, []).append((router, name, layout.flags))
    for ranks, started in by_ranks.items():
        folders = [root / f"{ranks}-{index}" for index in range(len(started))]
        cases = [
            {
                "flags": ["--router.name", router, *COMMON, *more.split(), *flags.split()],
                "steps": STEPS,
                "folder": str(folder),
                "topk_eval": [1, 3],
            }
            for (router, _, flags), folder in zip(started, folders, strict=True)
        ]
        answers = run_ranks(WORKER, {"cases": cases}, ranks=ranks, folder=root / f"ranks{ranks}", timeout=900)
        for (router, name, _), answer, folder in zip(started, answers, folders, strict=True):
            found[router, name] = Run(answer, folder)
    return found


def assert_same_run(found: Run, expected: Run) -> None:
    """Losses, norms and routing to 1e-5 at every step, all weights after the last one, and the evaluations."""
    for step, (one, other) in enumerate(zip(found.told["steps"], expected.told["steps"], strict=True)):
        for number in ("lm_loss", "grad_norm", "aux_loss", "z_loss", "entropy", "load"):
            assert one[number] == pytest.approx(other[number], rel=1e-5), (step, number)
    names = weight_names(expected.weights)
    assert weight_names(found.weights) == names
    weights, others = read_tensors(found.weights, names), read_tensors(expected.weights, names)
    for name in names:  # six Adam steps of up to 3e-3
        torch.testing.assert_close(weights[name], others[name], rtol=0, atol=1e-6, msg=name)
    # Each data-parallel rank evaluates micro-batches of its own, and all of them together the same tokens.
    assert found.told["evaluations"] == pytest.approx(expected.told["evaluations"], rel=1e-5)
