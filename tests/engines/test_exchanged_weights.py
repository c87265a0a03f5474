"""One engine reads the other's weights on another layout: the evaluation and the next step are those of the
run that wrote them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from engines.layout_table import COMMON, WORKER
from program.launched import Zygote

EP2 = "--expert-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
SPLIT = "--use-distributed-optimizer"
PAIRS = {  # who writes, who reads
    "DeepSpeed EP2 to Megatron TP2": (EP2, f"--engine megatron {TP2}"),
    "Megatron TP2 to DeepSpeed EP2": (f"--engine megatron {TP2}", EP2),
    "DeepSpeed TP2 to Megatron EP2, distributed optimizer": (TP2, f"--engine megatron {EP2} {SPLIT}"),
    "Megatron CP2, distributed optimizer to DeepSpeed PP2": (
        f"--engine megatron --context-parallel-size 2 {SPLIT}",
        PP2,
    ),
}
WRITTEN = 2  # steps


@pytest.fixture(scope="module", params=["topk", "hyper", "smoe_dropout"])
def told(
    request: pytest.FixtureRequest, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """For each pair: the writer's answer, with two steps more; the reader's evaluation; the reader's next
    step.
    """
    root = tmp_path_factory.mktemp("exchanged")
    cases: list[dict[str, Any]] = []
    for number, (writer, reader) in enumerate(PAIRS.values()):
        folder = str(root / str(number))
        writes, reads = (
            {"flags": ["--router.name", request.param, *COMMON, *flags.split()]} for flags in (writer, reader)
        )
        cases.append(writes | {"steps": WRITTEN, "folder": folder, "topk_eval": [1, 3], "resume": True})
        cases.append(reads | {"load_weights": folder, "steps": 0, "topk_eval": [1, 3]})
        cases.append(reads | {"load_weights": folder, "first": WRITTEN, "steps": 1})
    answers: list[dict[str, Any]] = run_ranks(
        zygote, WORKER, {"cases": cases}, ranks=2, folder=root / "ranks", timeout=600
    )
    return answers


@pytest.mark.parametrize("pair", PAIRS)
def test_what_one_engine_wrote_is_the_same_model_in_the_other(told: list[dict[str, Any]], pair: str) -> None:
    first = 3 * list(PAIRS).index(pair)
    writer, evaluated, trained = told[first : first + 3]
    assert evaluated["evaluations"] == pytest.approx(writer["evaluations"], rel=1e-6)
    next_step = writer["steps"][WRITTEN]
    (step,) = trained["steps"]
    assert step["lm_loss"] == pytest.approx(next_step["lm_loss"], rel=1e-6)
    assert step["grad_norm"] == pytest.approx(next_step["grad_norm"], rel=1e-5)
    assert abs(next_step["lm_loss"] - writer["steps"][0]["lm_loss"]) > 1e-4  # not the initial weights


def test_routers_of_the_writer_are_checked(zygote: Zygote, tmp_path: Path) -> None:
    """Weights of another router are refused, so equal losses above are no accident of a router that reads
    nothing.
    """
    cases = [{"flags": ["--router.name", "topk"], "steps": 0, "folder": str(tmp_path / "written")}]
    run_ranks(zygote, WORKER, {"cases": cases}, ranks=1, folder=tmp_path / "writer")
    cases = [
        {
            "flags": ["--router.name", "hyper", "--engine", "megatron"],
            "steps": 0,
            "load_weights": str(tmp_path / "written"),
            "refused": True,
        }
    ]
    (answer,) = run_ranks(zygote, WORKER, {"cases": cases}, ranks=1, folder=tmp_path / "reader")
    assert "not in the checkpoint" in str(answer["steps"][0]["refused"])
