"""``Engine.logits`` and the texts that a run writes with it are the same on every layout of both engines, and
no number of the run changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from engines.layout_worker import VOCABULARY
from program.launched import Zygote

WORKER = Path(__file__).with_name("logits_worker.py")
ENGINES = ("deepspeed", "megatron")
LAYOUTS = {
    "DP2": "",
    "EP2": "--expert-model-parallel-size 2",
    "TP2, SP": "--tensor-model-parallel-size 2 --sequence-parallel",
    "PP2": "--pipeline-model-parallel-size 2",
}
CAPACITY = "--moe-expert-capacity-factor 0.5"
DEEP = "--num-layers 4 --micro-batch-size 1"
MORE = {
    "capacity": CAPACITY,
    "apart": f"{CAPACITY} --no-moe-grouped-gemm",
    "deep": DEEP,
    "PP2, VPP2": f"{DEEP} --pipeline-model-parallel-size 2 --virtual-pipeline-model-parallel-size 2",
}
Told = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def told(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Told:
    home = tmp_path_factory.mktemp("logits")
    alone = [(engine, name) for engine in ENGINES for name in ("alone", "silent", "capacity", "apart")]
    alone.append(("megatron", "deep"))
    spread = [(engine, name) for engine in ENGINES for name in LAYOUTS] + [("megatron", "PP2, VPP2")]
    found: Told = {}
    for ranks, keys in ((1, alone), (2, spread)):
        cases = [
            {
                "flags": f"--router.name hyper --engine {engine} {(LAYOUTS | MORE).get(name, '')}".split(),
                "writes": name != "silent",
            }
            for engine, name in keys
        ]
        answers = run_ranks(zygote, WORKER, {"cases": cases}, ranks=ranks, folder=home / str(ranks))
        found |= dict(zip(keys, answers, strict=True))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_layout_gives_what_one_process_gives(told: Told, engine: str, layout: str) -> None:
    expected, found = told["deepspeed", "alone"], told[engine, layout]
    ours, theirs = (torch.tensor(each["logits"])[..., :VOCABULARY] for each in (found, expected))
    assert ours.shape == (3, 16, VOCABULARY) and theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert found["texts"] == expected["texts"]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6)


@pytest.mark.parametrize("name", ["capacity", "apart"])
@pytest.mark.parametrize("engine", ENGINES)
def test_no_capacity_drops_a_token(told: Told, engine: str, name: str) -> None:
    """A text is what the trained model would write, whatever follows it in its row."""
    expected, found = (torch.tensor(told[key]["logits"]) for key in (("deepspeed", "alone"), (engine, name)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_an_odd_number_of_micro_batches_in_interleaved_stages(told: Told) -> None:
    expected, found = told["megatron", "deep"], told["megatron", "PP2, VPP2"]
    torch.testing.assert_close(
        torch.tensor(found["logits"]), torch.tensor(expected["logits"]), rtol=0, atol=1e-5
    )
    assert found["texts"] == expected["texts"]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6)
    assert set(found["similarity"]) == {"1", "2", "3", "4"}
    assert found["similarity"] == pytest.approx(expected["similarity"], abs=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_writing_changes_no_number_of_the_run(told: Told, engine: str) -> None:
    assert told[engine, "alone"]["losses"] == told[engine, "silent"]["losses"]


def test_a_text_ends_where_a_sample_does(told: Told) -> None:
    lengths = [len(text.split()) for text in told["deepspeed", "alone"]["texts"][-1]]
    assert lengths == [13, 15, 1]
