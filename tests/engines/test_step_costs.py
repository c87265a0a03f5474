"""What a training step would cost a GPU beside its matrix products, counted on the CPU: operators started,
and numbers that the host reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from engines.audit_worker import DETAILS
from program.launched import Zygote

WORKER = Path(__file__).with_name("audit_worker.py")
BASE = "--router.name topk --moe-router-topk 2 --global-batch-size 2 --moe-grouped-gemm"
ENGINES = {"deepspeed": "", "megatron": "--engine megatron"}
VARIANTS = {
    "": "",
    "more experts": "--num-experts 16",
    "more layers": "--num-layers 3",
    "details": DETAILS,
}
EP2 = "--expert-model-parallel-size 2 --global-batch-size 4"
# For a layer and micro-batch: attention, experts, norms, router and statistics, forward and backward, Adam.
# Megatron-Core adds the gradient of each of nine parameters to its buffer.
LAUNCHES_OF_A_LAYER = {"deepspeed": 105, "megatron": 114}
NORMS = 4  # of a layer
LAYERS = 2  # of the cases without more


@pytest.fixture(scope="module")
def told(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    root = tmp_path_factory.mktemp("costs")
    cases = {
        (engine, variant): f"{BASE} {flags} {more}"
        for engine, flags in ENGINES.items()
        for variant, more in VARIANTS.items()
    }
    on_two = {
        (engine, f"EP2 {variant}"): f"{BASE} {flags} {more} {EP2}".replace("--global-batch-size 2 ", "")
        for engine, flags in ENGINES.items()
        for variant, more in VARIANTS.items()
        if variant in ("", "more layers")
    }
    found: dict[tuple[str, str], Any] = {}
    for ranks, table in ((1, cases), (2, on_two)):
        task = {"cases": [flags.split() for flags in table.values()]}
        answers = run_ranks(zygote, WORKER, task, ranks=ranks, folder=root / str(ranks))
        found.update(zip(table, answers, strict=True))
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_launches_do_not_depend_on_the_number_of_experts(
    told: dict[tuple[str, str], Any], engine: str
) -> None:
    assert told[engine, "more experts"]["launches"] == told[engine, ""]["launches"]


@pytest.mark.parametrize("engine", ENGINES)
def test_launches_of_a_layer(told: dict[tuple[str, str], Any], engine: str) -> None:
    one = told[engine, "more layers"]["launches"] - told[engine, ""]["launches"]
    one -= NORMS * told[engine, ""]["of_a_norm"]
    assert 0 < one <= LAUNCHES_OF_A_LAYER[engine], one


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_without_a_line_computes_no_details(told: dict[tuple[str, str], Any], engine: str) -> None:
    """Of each layer the sum of the probabilities, and in three operators that of the logits' variances; once
    a step two metrics from these sums.
    """
    saved = told[engine, "details"]["launches"] - told[engine, ""]["launches"]
    assert saved == 4 * LAYERS + 7


@pytest.mark.parametrize("engine", ENGINES)
def test_a_layer_reads_no_number(told: dict[tuple[str, str], Any], engine: str) -> None:
    few, many = told[engine, ""]["reads"], told[engine, "more layers"]["reads"]
    assert few == many, few.items() ^ many.items()


@pytest.mark.parametrize("engine", ENGINES)
def test_with_expert_parallelism_a_layer_reads_once(told: dict[tuple[str, str], Any], engine: str) -> None:
    few, many = (sum(told[engine, f"EP2 {variant}"]["reads"].values()) for variant in ("", "more layers"))
    assert many - few == 1
