"""Verifies planned layouts with the real engine: the first, middle and last rank of each, on fake tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.config.cli import dump
from megatron_hyperrouter.errors import HostError
from megatron_hyperrouter.planning.layouts import Candidate, Refusal
from megatron_hyperrouter.planning.plan import GIB, Plan, PlannedLayout

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig

_STEPS = 2  # AdamW's state exists from the second step on


def verify(plan: Plan, best: int, vocab_size: int, note: Callable[[str], None]) -> None:
    """Dry runs of the ``best`` layouts; a layout that needs more memory than a GPU has becomes refused."""

    def named(each: PlannedLayout, rank: int) -> str:
        """The table may give a layout another number: it leaves out those that a dry run finds too large."""
        return f"layout predicted as number {plan.layouts.index(each) + 1}, rank {rank}"

    asked = [(each, rank) for each in plan.fitting[:best] for rank in ranks_of(plan.gpus)]
    tasks = [task_of(each.candidate, rank, vocab_size, plan.machine.skew) for each, rank in asked]
    note(
        f"dry run of {len(tasks)} ranks: each rank builds its engine and runs {_STEPS} steps with fake "
        "tensors"
    )
    for (each, rank), told in zip(asked, answers(tasks), strict=True):
        if "error" in told:
            note(f"{named(each, rank)}: could not be verified: {told['error']}")
            continue
        each.verified.append(told | {"peak_bytes": told["peak_bytes"] + round(plan.machine.reserve)})
        note(f"{named(each, rank)}: {_compared(each, told)}")
    for each in plan.layouts:
        peak = max((run["peak_bytes"] for run in each.verified), default=0)
        if peak > plan.machine.memory:
            each.fits = False
            reason = (
                f"the dry run of this layout needs {peak / GIB:.1f} GiB, but a GPU has "
                f"{plan.machine.memory / GIB:.1f} GiB ({each.use.total / GIB:.1f} GiB were predicted)"
            )
            plan.refused.append(Refusal(each.candidate.layout(), reason, (reason,)))
    plan.layouts.sort(key=lambda each: not each.fits)


def ranks_of(world_size: int) -> list[int]:
    """First, middle and last; those of a few ranks once each."""
    return sorted({0, world_size // 2, world_size - 1})


def task_of(
    candidate: Candidate, rank: int, vocab_size: int, skew: float, *, whole: bool = False
) -> dict[str, Any]:
    """A task for ``dry/rank.py``; ``whole``: with all micro-batches of a step."""
    config = candidate.config
    if not whole:
        config = shortened(config, candidate.micro_batches, candidate.data_size)
    return {
        "settings": dump(config),
        "rank": rank,
        "world_size": candidate.world_size,
        "vocab_size": vocab_size,
        "skew": skew,
        "steps": _STEPS,
    }


def shortened(config: RunConfig, micro_batches: int, data_size: int) -> RunConfig:
    """The same step with no more micro-batches than a pipeline can hold, and with its last k."""
    stages = config.parallel.pipeline_model_parallel_size
    most = 2 * stages if stages > 1 else 2
    batch = min(micro_batches, most) * config.train.micro_batch_size * data_size
    constant = replace(config.topk, topk_schedule="constant", topk_start=None, topk_schedule_steps=None)
    train = replace(config.train, global_batch_size=batch, rampup_batch_size=None)
    return replace(config, topk=constant, train=train)


def answers(tasks: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The answer to each task in turn; raises HostError if no dry run starts."""
    command = [sys.executable, "-m", "megatron_hyperrouter.planning.dry.rank"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for task in tasks:
            try:
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if not line:
                raise HostError(
                    "the process of the dry run ended without a result", remedy="run bash tools/setup_env.sh"
                )
            yield json.loads(line)
        process.stdin.close()


def _compared(each: PlannedLayout, told: dict[str, Any]) -> str:
    rank = told["rank"]
    predicted = each.parameters[rank]
    same = "as predicted" if told["parameters"] == predicted else f"but {predicted:,} were predicted"
    return (
        f"{told['parameters']:,} parameters, {same}; "
        f"{told['built_bytes'] / GIB:.2f} GiB after the engine is built, "
        f"{told['peak_bytes'] / GIB:.2f} GiB at the peak"
    )
