"""One flipped bit of one weight on one rank is found and named, whatever makes ranks hold the same weight.

That equal replicas are found equal is checked in every case of every layout test, see ``layout_worker.py``.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from program.launched import Zygote

WORKER = Path(__file__).with_name("layout_worker.py")
QKV, NORM = "self_attention.linear_qkv.weight", "final_layernorm.weight"
EXPERT, ROUTER = "linear_fc1.weight", "0.mlp.router.embedding_S"
EMBEDDING = "embedding.word_embeddings.weight"
# name -> ranks, flags, and (rank whose bit is flipped, which weight): (deviating ranks, the others, sure)
LAYOUTS: dict[str, tuple[int, str, dict[tuple[int, str], tuple[list[int], list[int], bool]]]] = {
    "deepspeed, DP 4, EP 2": (
        4,
        "--expert-model-parallel-size 2 --zero-stage 1",
        {
            (2, QKV): ([2], [0, 1, 3], True),
            (0, ROUTER): ([0], [1, 2, 3], True),
            (3, EXPERT): ([3], [1], False),  # two ranks have these experts
        },
    ),
    "megatron, TP 2, EP 2, distributed": (
        4,
        "--engine megatron --tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
        "--expert-tensor-parallel-size 1 --use-distributed-optimizer",
        {
            (1, NORM): ([1], [0, 2, 3], True),
            (3, ROUTER): ([3], [0, 1, 2], True),
            (2, QKV): ([2], [0], False),  # ranks 0 and 2 hold the first half of it
            (2, EXPERT): ([2], [0], False),
        },
    ),
    "megatron, PP 2": (
        2,
        "--engine megatron --pipeline-model-parallel-size 2",
        {(1, EMBEDDING): ([1], [0], False), (1, QKV): ([], [], False)},  # no other rank has that layer
    ),
}
Told = dict[str, list[Any]]


@pytest.fixture(scope="module")
def told(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Told:
    root, found = tmp_path_factory.mktemp("replicas"), {}
    for ranks in (2, 4):
        names = [name for name, (needed, _, _) in LAYOUTS.items() if needed == ranks]
        cases = [
            {"flags": ["--router.name", "hyper", *flags.split()], "steps": 2, "flips": list(flips)}
            for _, flags, flips in (LAYOUTS[name] for name in names)
        ]
        answers = run_ranks(zygote, WORKER, {"cases": cases}, ranks=ranks, folder=root / str(ranks))
        found |= {name: answer["flipped"] for name, answer in zip(names, answers, strict=True)}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_flipped_bit_is_named(told: Told, layout: str) -> None:
    host = socket.gethostname()
    for ((_, end), (ranks, others, sure)), strays in zip(
        LAYOUTS[layout][2].items(), told[layout], strict=True
    ):
        if not ranks:
            assert strays == []
            continue
        ((name, deviating, rest, certain),) = strays
        assert name.endswith(end)
        assert deviating == [[rank, host] for rank in ranks] and rest == [[rank, host] for rank in others]
        assert certain is sure
