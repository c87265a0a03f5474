"""Runs whose batch grows, against a plain loop over the steps, megatron-core's scheduler, one process, and
the run that was never stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from program.launched import Record, Zygote, metrics
from program.settings import SEQ, flags_of, write_numbers

pytestmark = pytest.mark.processes
FULL, START, INCREMENT, SAMPLES = 8, 2, 2, 30
STEPS, SAVED = 12, 7  # the step after the save is the last of its size
SETTINGS = (
    "--router.name hyper --adam-eps 1e-4 --tokenizer-type NullTokenizer --vocab-size 960 --split 1 "
    "--eval-interval 0 --micro-batch-size 1 --lr-warmup-iters 2 --min-lr 1e-3"
).split()
RAMPUP = f"--rampup-batch-size {START} {INCREMENT} {SAMPLES}".split()
LAYOUTS = {
    "deepspeed, ZeRO-2": (2, "--zero-stage 2"),
    "deepspeed, stages": (2, "--pipeline-model-parallel-size 2"),
    "megatron, stages": (2, "--engine megatron --pipeline-model-parallel-size 2"),
}


def plain_sizes() -> Iterator[int]:
    """What --rampup-batch-size means, in a loop."""
    consumed = 0
    for _ in range(STEPS):
        increments = (FULL - START) // INCREMENT
        size = FULL if consumed > SAMPLES else START + int(consumed / (SAMPLES / increments)) * INCREMENT
        yield size
        consumed += size


def megatron_rates() -> list[float]:
    """Learning rates of megatron-core's scheduler, which counts samples, after each step."""
    sizes = list(plain_sizes())
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[{}]),
        init_lr=0.0,
        max_lr=1e-2,
        min_lr=1e-3,
        lr_warmup_steps=2 * FULL,
        lr_decay_steps=sum(sizes),
        lr_decay_style="cosine",
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )
    rates = []
    for size in sizes:
        scheduler.step(size)
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
    return rates


@pytest.fixture(scope="module", name="numbers")
def _numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_numbers(tmp_path_factory.mktemp("numbers") / "numbers", range(960))


class Alone(NamedTuple):
    """The run of one process: its metrics, and the samples that it read."""

    records: list[Record]
    samples: list[list[int]]


@pytest.fixture(scope="module", name="alone")
def _alone(zygote: Zygote, numbers: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    run_dir = tmp_path_factory.mktemp("alone")
    zygote.run(flags_of(numbers, run_dir, layout=[*SETTINGS, *RAMPUP]), noted="read")
    return Alone(metrics(run_dir), read(zygote))


def read(zygote: Zygote) -> list[list[int]]:
    """The samples of the last job, in their order."""
    lines = [
        json.loads(line)
        for path in (zygote.folder / f"job-{zygote.jobs}" / "read").iterdir()
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return [row for _, rows in sorted(lines) for row in rows]


def test_the_schedule_is_a_plain_loop(alone: Alone) -> None:
    sizes, records = list(plain_sizes()), alone.records
    assert len({*sizes}) == 4 and sizes[SAVED - 1 : SAVED + 2] == [4, 4, 6]
    consumed = [sum(sizes[:step]) for step in range(1, STEPS + 1)]
    assert [record["consumed_samples"] for record in records] == consumed
    assert [record["consumed_tokens"] for record in records] == [SEQ * count for count in consumed]
    assert [record["learning_rate"] for record in records] == pytest.approx(megatron_rates(), rel=1e-12)


def test_samples_are_those_of_a_batch_that_does_not_grow(
    zygote: Zygote, numbers: Path, tmp_path: Path, alone: Alone
) -> None:
    """The order of the samples is a function of the seed and of how many were read before.  Both runs need as
    many epochs.
    """
    count = sum(plain_sizes())
    flags = [*SETTINGS, "--train-iters", str(-(-count // FULL))]
    zygote.run(flags_of(numbers, tmp_path, layout=flags), noted="read")
    assert len(alone.samples) == count
    assert read(zygote)[:count] == alone.samples


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_run_of_one_process_and_resumes_bit_for_bit(
    zygote: Zygote, numbers: Path, tmp_path: Path, alone: Alone, layout: str
) -> None:
    ranks, flags = LAYOUTS[layout]
    words = [*SETTINGS, *RAMPUP, *flags.split()]
    whole, run_dir, moved = (tmp_path / name for name in ("whole", "run", "moved"))
    zygote.run(flags_of(numbers, whole, layout=words), ranks=ranks)
    assert metrics(whole) == [pytest.approx(record, rel=1e-5) for record in alone.records]
    first = flags_of(numbers, run_dir, "--exit-interval", SAVED, layout=words)
    zygote.run(first, ranks=ranks, expect=6)
    shutil.copytree(run_dir, moved)
    zygote.run(flags_of(numbers, run_dir, "--load", run_dir, layout=words), ranks=ranks)
    assert metrics(run_dir) == metrics(whole)
    if "zero" in flags:
        return  # one layout of each engine moves to the other
    other = "--engine deepspeed" if "megatron" in flags else "--engine megatron"
    on_one = [*SETTINGS, *RAMPUP, *other.split()]
    zygote.run(flags_of(numbers, moved, "--load", moved, layout=on_one))
    assert metrics(moved) == [pytest.approx(record, rel=1e-5) for record in alone.records]
