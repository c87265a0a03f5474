"""A bad step in both engines: one rank's gradients are not finite, and they never reach the weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from program.launched import Record, Zygote, metrics, one_message
from program.settings import RANKS, flags_of
from program.test_program_killed import killed_at
from program.test_program_outputs import weights_of

from megatron_hyperrouter.guard.events import read_events

pytestmark = pytest.mark.processes
SHORT = "--train-iters 6 --save-interval 0 --eval-interval 0 --hidden-dropout 0.1".split()
LAYOUTS = {
    "deepspeed, ZeRO 1, EP 2": "--expert-model-parallel-size 2 --zero-stage 1",
    "deepspeed, ZeRO 0": "--zero-stage 0",
    "deepspeed, ZeRO 1, bfloat16": "--zero-stage 1 --bf16",
    "megatron, TP 2": "--engine megatron --tensor-model-parallel-size 2 --sequence-parallel",
    "megatron, distributed optimizer": "--engine megatron --use-distributed-optimizer",
}
ALWAYS = {"step": 4, "rank": 1, "times": 9}


def trained(run_dir: Path) -> list[Record]:
    return [record for record in metrics(run_dir) if "skipped" not in record]


SLOW = ("deepspeed, ZeRO 1, bfloat16", "megatron, TP 2")  # the others hold both ways of a veto


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(flags, id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for name, flags in LAYOUTS.items()
    ],
)
def test_a_step_that_is_skipped_leaves_nothing(
    zygote: Zygote, text: Path, tmp_path: Path, layout: str
) -> None:
    found, named = tmp_path / "found", tmp_path / "named"
    flags = [*SHORT, "--on-bad-step", "skip"]
    job = zygote.run(flags_of(text, found, *flags, layout=layout.split()), ranks=RANKS, fault=ALWAYS)
    zygote.run(flags_of(text, named, *SHORT, "--skip-steps", 4, layout=layout.split()), ranks=RANKS)
    assert [record["step"] for record in metrics(found) if record.get("skipped")] == [4]
    assert trained(found) == trained(named) and len(trained(found)) == 5
    ours, theirs = weights_of(found), weights_of(named)
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
    (event,) = (event for event in read_events(found / "events.jsonl") if event["event"] == "bad_step")
    assert "so the cause is in the data, the settings or the weights" in str(event["attribution"])
    assert "rank 1 (" in str(event["attribution"]) and "linear_qkv.weight" in str(event["attribution"])
    assert "step 4: grad_norm is" in job.stderr


# Natural changes of loss and norm are bad steps here, so that the window decides all the time.
NARROW = "--train-iters 12 --eval-interval 0 --on-bad-step skip --max-loss-sigma 2 --loss-window 4".split()


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
def test_killed_inside_the_window_it_judges_as_the_run_that_nobody_killed(
    zygote: Zygote, text: Path, tmp_path: Path, engine: str
) -> None:
    """SIGKILL to all ranks, twice; every step, and which were skipped, is equal in every bit."""
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    layout = {
        "deepspeed": ["--zero-stage", "1", "--expert-model-parallel-size", "2"],
        "megatron": ["--engine", "megatron", "--use-distributed-optimizer"],
    }[engine]
    words = [*NARROW, "--moe-router-topk", 2, "--hidden-dropout", 0.1, "--save-interval", 2]
    zygote.run(flags_of(text, whole, *words, layout=layout), ranks=RANKS)
    flags = flags_of(text, run_dir, *words, "--load", run_dir, layout=layout)
    dice = random.Random(engine)
    moments: list[int | str] = [dice.choice((5, 6)), dice.choice((8, 9, 10))]
    killed_at(moments, zygote, flags, run_dir, dice, ranks=RANKS)
    zygote.run(flags, ranks=RANKS)
    assert metrics(run_dir) == metrics(whole)
    ours, theirs = weights_of(run_dir), weights_of(whole)
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
    skipped = {event["step"] for event in read_events(whole / "events.jsonl") if event["event"] == "bad_step"}
    assert 0 < len(skipped & set(range(7, 13))) < 6  # it decided both ways


def test_a_fault_that_passes_stops_the_run_with_its_rank(zygote: Zygote, text: Path, tmp_path: Path) -> None:
    fault: dict[str, Any] = {**ALWAYS, "times": 1}
    flags = flags_of(text, tmp_path / "run", *SHORT, layout=LAYOUTS["deepspeed, ZeRO 1, EP 2"].split())
    job = zygote.run(flags, ranks=RANKS, fault=fault, expect=1)
    assert "step 4: grad_norm is" in one_message(job.stderr)
    assert "a temporary hardware fault is likely" in job.stderr
