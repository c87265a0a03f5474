"""The memory formula: state by hand, and everything against dry runs of the true engine."""

from __future__ import annotations

import pytest
from planning.formula_cases import LAYOUTS, VOCABULARY, candidate_of

from megatron_hyperrouter.model.spec import padded_vocab_size
from megatron_hyperrouter.planning.held.frozen import frozen_of
from megatron_hyperrouter.planning.held.memory import Estimator, Use
from megatron_hyperrouter.planning.held.parameters import model_of
from megatron_hyperrouter.planning.held.stages import stages_of
from megatron_hyperrouter.planning.machine import Machine
from megatron_hyperrouter.planning.verified import answers, task_of


def uses_of(name: str) -> list[Use]:
    """By the formula, of each stage."""
    laid_out = candidate_of(LAYOUTS[name])
    config, stages = laid_out.config, stages_of(laid_out.config)
    model = model_of(config, VOCABULARY)
    machine = Machine(memory=0.0, per_node=8, reserve=0.0, skew=LAYOUTS[name].skew)
    estimator = Estimator(
        model, frozen_of(config, VOCABULARY), padded_vocab_size(VOCABULARY, config), machine
    )
    return [estimator.of_stage(laid_out, stages, number) for number in range(len(stages))]


def test_state_of_a_rank_by_hand() -> None:
    # EP4 of 8 ranks: dense parameters on all 8, experts on 2.
    (use,) = uses_of("medium, megatron EP4")
    experts = 8 * 16 * 3 * 1024 * 1024 // 4
    attention = 8 * (1024 * (16 + 2 * 4) * 64 + 1024 * 1024 + 2 * 1024)
    dense = attention + 8 * 16 * 1024 + 32_000 * 1024 + 1024
    assert use.weights == 2 * (dense + experts)
    assert use.gradients == 4 * (dense + experts)
    assert use.optimizer == 12 * (dense / 8 + experts / 2)


@pytest.mark.parametrize(("name", "ranks"), [("small, megatron EP4", 1), ("small, megatron divided", 8)])
def test_a_hypernetwork_by_hand(name: str, ranks: int) -> None:
    (use,) = uses_of(name)
    first, second = 256 * 256 + 256, 256 * 16 * 256 + 16 * 256  # W1, b1; W2, b2
    made = 2 * 16 * 256 + 256  # this step's router and the sum of its gradients, and the hidden units
    assert use.hypernetwork == pytest.approx(4 * 4 * (first + second / ranks + made), rel=1e-3)


@pytest.fixture(scope="module")
def peaks() -> dict[tuple[str, int], int]:
    """Of a step by a dry run, for each layout and stage."""
    asked = []
    for name, laid in LAYOUTS.items():
        laid_out = candidate_of(laid)
        stages = laid_out.config.parallel.pipeline_model_parallel_size
        for stage in range(stages):
            rank = stage * laid_out.world_size // stages
            asked.append(((name, stage), task_of(laid_out, rank, VOCABULARY, laid.skew)))
    found = {}
    for (key, _), told in zip(asked, answers(task for _, task in asked), strict=True):
        assert "error" not in told, (key, told)
        found[key] = told["peak_bytes"]
    return found


@pytest.mark.by_hand
@pytest.mark.parametrize("name", LAYOUTS)
def test_formula_is_within_a_tenth_of_the_dry_run(
    peaks: dict[tuple[str, int], int], name: str, record_property: object
) -> None:
    for stage, use in enumerate(uses_of(name)):
        record_property(f"stage {stage}", (use.total, peaks[name, stage]))  # type: ignore[operator]
        assert use.total == pytest.approx(peaks[name, stage], rel=0.1), (stage, use)
