"""Real commands of Megatron-LM train on both engines; one table makes the models smaller, and nothing else
changes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from config.test_config_megatron_commands import COMMANDS
from distributed import run_ranks
from engines.layout_table import WORKER
from program.launched import Zygote

RANKS = 2
# Flag -> the words in place of the command's own; None: the flag is left out.
SHRUNK: dict[str, str | None] = {
    "--num-layers": "4",
    "--hidden-size": "32",
    "--ffn-hidden-size": "40",
    "--num-attention-heads": "4",
    "--num-query-groups": "2",
    "--kv-channels": "8",
    "--seq-length": "16",
    "--num-experts": "8",
    "--moe-router-topk": "4",
    "--moe-layer-freq": "([0]+[1]*3)",
    "--moe-ffn-hidden-size": "24",
    "--moe-shared-expert-intermediate-size": "24",
    "--moe-router-num-groups": "4",
    "--moe-router-group-topk": "2",
    "--q-lora-rank": "12",
    "--kv-lora-rank": "8",
    "--qk-head-dim": "8",
    "--qk-pos-emb-head-dim": "4",
    "--v-head-dim": "6",
    "--make-vocab-size-divisible-by": "8",
    "--pipeline-model-parallel-size": "1",
    "--decoder-first-pipeline-num-layers": None,
    "--decoder-last-pipeline-num-layers": None,
    "--tensor-model-parallel-size": "1",
    "--rampup-batch-size": "4 4 16",
    "--expert-model-parallel-size": "2",
    "--micro-batch-size": "2",
    "--global-batch-size": "8",
    "--transformer-impl": "local",  # this machine may lack the other
}
ENGINES = ("deepspeed", "megatron")


def shrunk(path: Path) -> list[str]:
    words = []
    for name, *values in json.loads(path.read_text(encoding="utf-8")):
        shrunk_to = SHRUNK.get(name, " ".join(values))
        words += [] if shrunk_to is None else [name, *shrunk_to.split()]
    return words


def rows_of(stem: str) -> int:
    """Rows of the embedding: the 61 ids padded to a multiple, by default of 128."""
    (path,) = (path for path in COMMANDS if path.stem == stem)
    return 64 if "--make-vocab-size-divisible-by" in shrunk(path) else 128


def keys() -> list[tuple[str, str, str]]:
    """(command, router, engine): each with a HyperRouter, and with its own router."""
    return [
        (path.stem, router, engine) for path in COMMANDS for router in ("hyper", "topk") for engine in ENGINES
    ]


@pytest.fixture(scope="module")
def told(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Any]:
    by_stem = {path.stem: path for path in COMMANDS}
    cases = [
        {
            "flags": [*shrunk(by_stem[stem]), "--router.name", router, "--engine", engine],
            "bare": True,
            "steps": 3,
        }
        for stem, router, engine in keys()
    ]
    folder = tmp_path_factory.mktemp("commands")
    answers = run_ranks(zygote, WORKER, {"cases": cases}, ranks=RANKS, folder=folder, timeout=400)
    return dict(zip(keys(), answers, strict=True))


@pytest.mark.parametrize("key", keys(), ids="-".join)
def test_three_steps(told: dict[tuple[str, str, str], Any], key: tuple[str, str, str]) -> None:
    steps = told[key]["steps"]
    assert len(steps) == 3
    for step in steps:
        # Nothing is known yet: the loss is that of the padded vocabulary, and gradients are there.
        assert step["lm_loss"] == pytest.approx(math.log(rows_of(key[0])), rel=0.02)
        assert 0 < step["grad_norm"] < math.inf


@pytest.mark.parametrize("router", ["hyper", "topk"])
@pytest.mark.parametrize("stem", sorted(path.stem for path in COMMANDS))
def test_the_engines_agree(told: dict[tuple[str, str, str], Any], stem: str, router: str) -> None:
    one, other = (told[stem, router, engine]["steps"] for engine in ENGINES)
    for left, right in zip(one, other, strict=True):
        assert left["lm_loss"] == pytest.approx(right["lm_loss"], rel=2e-3)  # bfloat16
