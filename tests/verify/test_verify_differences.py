"""How layouts are written, and how differences of two runs are measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_hyperrouter.checkpoint.weights import write_weights
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.verify.differences import (
    Difference,
    Evidence,
    Tolerances,
    compare,
    in_bfloat16,
    parse_layout,
    samples_for,
)

STEP = {"lm_loss": 5.0, "aux_loss": 1.0, "grad_norm": 2.0}
ROUTER = "decoder.layers.0.mlp.router."


def left(
    folder: Path,
    *,
    gradients: dict[str, Tensor],
    last: dict[str, Tensor],
    step: dict[str, float],
    digest: str = "a",
) -> Evidence:
    """A run of one step on two ranks."""
    start = {name: torch.ones_like(tensor) for name, tensor in gradients.items()}
    for name, tensors in (
        ("before", start),
        ("after", {key: start[key] - 1024 * gradients[key] for key in start}),
        ("last", last),
    ):
        (folder / name).mkdir(parents=True)
        write_weights(folder / name, 0, tensors)
    return Evidence(
        [step], [{ROUTER: "a"}, {ROUTER: digest}], folder / "before", folder / "after", folder / "last"
    )


@pytest.fixture
def reference(tmp_path: Path) -> Evidence:
    small, large = torch.full((4,), 0.01), torch.tensor([3.0, -4.0])
    return left(
        tmp_path / "reference",
        gradients={"small": small, "large": large},
        last={"w": torch.zeros(3)},
        step=STEP,
    )


def values(found: Evidence, reference: Evidence) -> dict[str, tuple[float, str]]:
    return {
        each.number: (each.value, each.where)
        for each in compare(found, reference, config=RunConfig(), allowed=Tolerances())
    }


def test_equal_runs_differ_in_nothing(reference: Evidence) -> None:
    assert {value for value, _ in values(reference, reference).values()} == {0.0}


def test_each_number_is_told_with_its_place(tmp_path: Path, reference: Evidence) -> None:
    path = RunConfig().optimizer.lr  # of one step
    found = left(
        tmp_path / "found",
        gradients={"small": torch.tensor([0.01, 0.01, 0.02, 0.01]), "large": torch.tensor([3.0, -4.5])},
        last={"w": torch.tensor([0.0, path / 2, 0.0])},
        step={"lm_loss": 5.5, "aux_loss": 0.5, "grad_norm": 2.0},
        digest="b",
    )
    told = values(found, reference)
    assert (
        told["lm_loss"][0] == pytest.approx(0.1)
        and told["aux_loss"][0] == pytest.approx(0.5)
        and told["grad_norm"] == (0.0, "")
    )
    assert told["lm_loss"][1].startswith("step 1: 5.5 instead of 5")
    # 0.01 of 0.01; the large one is an eighth off
    assert told["gradients"] == (
        pytest.approx(1.0, rel=1e-3),
        "small",
    )
    assert told["weights"] == (pytest.approx(0.5, rel=1e-3), "w")
    assert told["frozen parts"] == (1.0, "rank 1 has a different decoder.layers.0.mlp.router")


def test_noise_in_gradients_of_almost_nothing_is_relative_to_the_others(tmp_path: Path) -> None:
    runs = []
    for name, noise in (("one", 1e-9), ("two", -1e-9)):
        gradients = {"nothing": torch.full((2,), noise), "large": torch.tensor([1.0])}
        runs.append(left(tmp_path / name, gradients=gradients, last={"w": torch.zeros(1)}, step=STEP))
    assert values(*runs)["gradients"][0] < 1e-5


def test_not_a_number_fails(tmp_path: Path, reference: Evidence) -> None:
    gradients = {"small": torch.full((4,), math.nan), "large": torch.tensor([3.0, -4.0])}
    found = left(
        tmp_path / "found", gradients=gradients, last={"w": torch.zeros(3)}, step=STEP | {"lm_loss": math.nan}
    )
    by_number = {
        each.number: each for each in compare(found, reference, config=RunConfig(), allowed=Tolerances())
    }
    assert (
        not by_number["lm_loss"].ok
        and not by_number["gradients"].ok
        and by_number["gradients"].where == "small"
    )
    assert by_number["weights"].ok


@pytest.mark.parametrize(
    ("text", "ranks", "data_size"),
    [
        ("", 1, 1),
        ("dp=2", 2, 2),
        ("tp=2", 2, 1),
        ("ep=2", 2, 2),
        ("tp=2,ep=2", 4, 2),
        ("tp=2, ep=2, etp=1", 2, 1),
        ("pp=2,vpp=2", 2, 1),
        ("pp=2,ep=2", 4, 2),
        ("tp=2,pp=2,ep=2", 8, 2),
        ("cp=2,dp=3", 6, 3),
    ],
)
def test_ranks_of_a_layout(text: str, ranks: int, data_size: int) -> None:
    layout = parse_layout(text)
    assert (layout.ranks, layout.data_size) == (ranks, data_size)


def test_settings_in_a_layout() -> None:
    layout = parse_layout(
        "tp=2,zero=0,use-distributed-optimizer=true,moe_token_dispatcher_type=allgather,fault=aux-loss"
    )
    overrides = layout.overrides
    assert (
        overrides["tensor_model_parallel_size"] == 2
        and overrides["sequence_parallel"] is True
        and overrides["zero_stage"] == 0
    )
    assert (
        overrides["use_distributed_optimizer"] is True
        and overrides["moe_token_dispatcher_type"] == "allgather"
    )
    assert layout.fault == "aux-loss" and "fault" not in overrides


@pytest.mark.parametrize("text", ["tp", "tp=0", "tp=two", "ep=-1"])
def test_a_layout_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--layouts"):
        parse_layout(text)


def test_all_layouts_share_a_global_batch() -> None:
    layouts = [parse_layout(text) for text in ("", "dp=3", "pp=4", "dp=2,pp=2")]
    samples = samples_for(layouts, micro_batch_size=5)
    for layout in layouts:
        assert samples % (5 * layout.data_size * layout.stages) == 0 and samples >= 10 * layout.data_size


def test_sizes_are_named() -> None:
    assert parse_layout("tp=2,pp=3,ep=2,cp=1,etp=1,dp=2").sizes == {
        "TP": 2,
        "PP": 3,
        "CP": 1,
        "EP": 2,
        "DP": 2,
    }


def test_tolerances_follow_what_bfloat16_changes() -> None:
    def told(lm_loss: float, gradients: float) -> Tolerances:
        values = {
            "lm_loss": lm_loss,
            "aux_loss": 0.0,
            "grad_norm": 0.001,
            "gradients": gradients,
            "weights": 0.5,
        }
        return in_bfloat16([Difference(number, value, 0.0, "") for number, value in values.items()])

    assert told(0.01, 0.1) == Tolerances(numbers=0.02, gradients=0.1, weights=1.5)
    assert told(0.0, 0.001) == Tolerances(numbers=2.0**-7, gradients=0.0625, weights=1.5)
    assert told(0.0, 3.0).gradients == 0.25
