"""Methods that consult experts, tokens and counts give the run of one process on every layout of both
engines, and resume bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from engines.layout_table import COMMON, Layout, Table, assert_same_run, run_table
from program.launched import Zygote

from megatron_hyperrouter.ops.competition import Capped

WORKER = Path(__file__).with_name("probe_worker.py")
# Options that bring a competition, a comparison of experts and a change of stage into the few steps of a
# test.
ROUTERS = {
    "competesmoe, v2": "competesmoe --router.rate 0.6 --router.warm-up 0 --router.max-competing 1 "
    "--router.router-coeff 0.5",
    "competesmoe, v1": "competesmoe --router.version v1 --router.rate 0.6 --router.router-coeff 0.5",
    "simsmoe": "simsmoe --router.frequency 0.15 --router.threshold 0 --router.similarity-coeff 0.1",
    "stablemoe": "stablemoe --router.stage1-steps 2",
    "probe": "probe",
}
TP2, EP2, PP2 = (
    "--tensor-model-parallel-size 2",
    "--expert-model-parallel-size 2",
    "--pipeline-model-parallel-size 2",
)
MEGATRON = "--engine megatron"
LAYOUTS = {
    "deepspeed, EP2, recompute": Layout(2, f"{EP2} --recompute-granularity full"),
    "deepspeed, TP2, SP": Layout(2, f"{TP2} --sequence-parallel"),
    "deepspeed, PP2": Layout(2, PP2),
    "megatron, 1 rank, recompute": Layout(1, f"{MEGATRON} --recompute-granularity full"),
    "megatron, EP2": Layout(2, f"{MEGATRON} {EP2}"),
    "megatron, TP2": Layout(2, f"{MEGATRON} {TP2} --sequence-parallel"),
    "megatron, PP2": Layout(2, f"{MEGATRON} {PP2}"),
    "megatron, CP2": Layout(2, f"{MEGATRON} --context-parallel-size 2"),
    "megatron, DP2, overlap": Layout(2, f"{MEGATRON} --use-distributed-optimizer --ddp-bucket-size 500"),
    **{
        f"{name}, capacity": layout._replace(settings="--moe-expert-capacity-factor 0.7")
        for name, layout in {
            "megatron, 1 rank": Layout(1, MEGATRON),
            "megatron, PP2": Layout(2, f"{MEGATRON} {PP2}"),
        }.items()
    },
    "megatron, TP2 x EP2, expert-TP 2": Layout(4, f"{MEGATRON} {TP2} {EP2} --sequence-parallel"),
}


@pytest.fixture(scope="module")
def table(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Table:
    """The reference is one process of DeepSpeed."""
    return run_table(zygote, LAYOUTS, ROUTERS.values(), tmp_path_factory.mktemp("layouts"), worker=WORKER)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("router", ROUTERS)
def test_layout_gives_the_run_of_one_process(
    table: Table, router: str, layout: str, record_property: Callable[[str, object], None]
) -> None:
    assert_same_run(table, ROUTERS[router], layout, record_property)


def test_the_steps_of_a_test_hold_competitions_and_ordinary_passes() -> None:
    plan = Capped(seed=1234, rate=0.6, warm_up=0, num_layers=2, max_competing=1)
    for layer in (1, 2):
        assert {plan.competes(step=step, layer=layer) for step in range(3)} == {True, False}


RESUMED = {
    "deepspeed, 1 rank": (1, ""),
    "deepspeed, PP2 x EP2": (4, f"{PP2} {EP2}"),
    "megatron, TP2 x EP2": (4, f"{MEGATRON} {TP2} {EP2} --sequence-parallel"),
}


@pytest.fixture(scope="module")
def resumed(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """Three steps, a checkpoint, two more steps, and these two again from the checkpoint."""
    root = tmp_path_factory.mktemp("resumed")
    keys = [(router, layout) for router in ROUTERS for layout in RESUMED]
    found: dict[tuple[str, str], Any] = {}
    for ranks in sorted({ranks for ranks, _ in RESUMED.values()}):
        now = [(router, layout) for router, layout in keys if RESUMED[layout][0] == ranks]
        cases = [
            {
                "flags": ["--router.name", *ROUTERS[router].split(), *COMMON, *RESUMED[layout][1].split()],
                "steps": 3,
                "folder": str(root / f"{ranks}-{number}"),
                "resume": True,
            }
            for number, (router, layout) in enumerate(now)
        ]
        found |= zip(
            now,
            run_ranks(
                zygote, WORKER, {"cases": cases}, ranks=ranks, folder=root / f"ranks{ranks}", timeout=900
            ),
            strict=True,
        )
    return found


@pytest.mark.parametrize("layout", RESUMED)
@pytest.mark.parametrize("router", ROUTERS)
def test_resumed_steps_are_the_same_bit_for_bit(
    resumed: dict[tuple[str, str], Any], router: str, layout: str
) -> None:
    steps = resumed[router, layout]["steps"]
    assert len(steps) == 7
    assert steps[5:] == steps[3:5]
