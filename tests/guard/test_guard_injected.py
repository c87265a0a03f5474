"""Five injected faults in the real engines: each gives an alarm within 20 steps, the same on every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from program.launched import Zygote

WORKER = Path(__file__).with_name("health_worker.py")
WAYS = {
    # what is done to a healthy run -> the alarms of the first step that gives any
    "unbalancing loss": {"imbalance", "collapse"},
    "equal experts": {"loss_spike"},
    "router x 10": {"entropy"},
    "popular expert": {"imbalance"},
    "learning rate": {"loss_spike"},
}
ALONE = {"deepspeed": "--engine deepspeed", "megatron": "--engine megatron"}
ON_TWO = {
    "deepspeed, EP2": "--engine deepspeed --expert-model-parallel-size 2",
    "deepspeed, PP2": "--engine deepspeed --pipeline-model-parallel-size 2",
    "megatron, EP2": "--engine megatron --expert-model-parallel-size 2",
    "megatron, TP2": "--engine megatron --tensor-model-parallel-size 2 --sequence-parallel",
}


@pytest.fixture(scope="module")
def told(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Layout -> what each way led to; and "healthy", "raised"."""
    folder = tmp_path_factory.mktemp("health")
    start = str(folder / "healthy")
    cases = [{"do": "healthy", "folder": start, "flags": []}]
    cases += [
        {"do": "broken", "folder": start, "flags": flags.split(), "ways": list(WAYS)}
        for flags in ALONE.values()
    ]
    raising = "--alarm imbalance=raise-aux"
    cases += [
        {"do": "raised", "folder": start, "flags": f"{flags} {raising}".split()} for flags in ALONE.values()
    ]
    healthy, *alone = run_ranks(zygote, WORKER, {"cases": cases}, ranks=1, folder=folder / "one")
    cases = [
        {"do": "broken", "folder": start, "flags": flags.split(), "ways": list(WAYS)}
        for flags in ON_TWO.values()
    ]
    two = run_ranks(zygote, WORKER, {"cases": cases}, ranks=2, folder=folder / "two")
    found = dict(zip([*ALONE, *ON_TWO], [*alone[: len(ALONE)], *two], strict=True))
    return found | {"healthy": healthy, "raised": dict(zip(ALONE, alone[len(ALONE) :], strict=True))}


def test_a_healthy_run_gives_no_alarm(told: dict[str, Any]) -> None:
    assert told["healthy"] == []


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_break_a_run_is_noticed(told: dict[str, Any], way: str) -> None:
    alarms = told["deepspeed"][way]["alarms"]
    assert {alarm["alarm"] for alarm in alarms} == WAYS[way]
    assert all(101 <= alarm["since"] <= alarm["step"] <= 120 for alarm in alarms)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", [*ALONE, *ON_TWO][1:])
def test_every_layout_decides_alike(told: dict[str, Any], layout: str, way: str) -> None:
    for ours, theirs in zip(told[layout][way]["alarms"], told["deepspeed"][way]["alarms"], strict=True):
        for number in ("value", "threshold"):
            assert ours.pop(number) == pytest.approx(theirs[number], rel=1e-3)
        assert ours == {name: value for name, value in theirs.items() if name in ours}
    for ours, theirs in zip(
        told[layout][way]["similarity"], told["deepspeed"][way]["similarity"], strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_only_similarity_sees_equal_experts_for_long(told: dict[str, Any]) -> None:
    before, after = told["deepspeed"]["equal experts"]["similarity"]
    assert max(before.values()) < 0.8 and min(after.values()) > 0.99


@pytest.mark.parametrize("engine", ALONE)
def test_a_raised_balance_loss_is_part_of_the_checkpoint(told: dict[str, Any], engine: str) -> None:
    found = told["raised"][engine]
    assert [alarm["action"] for alarm in found["alarms"]] == ["raise-aux"]
    assert found["coefficients"] == [[0.02], [0.02]]
    stayed, resumed = found["steps"]
    assert stayed == resumed
