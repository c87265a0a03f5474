"""All layouts of a run over a number of GPUs, ranked by predicted speed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.config.derived import global_batch_size
from megatron_hyperrouter.errors import ConfigError, Problem
from megatron_hyperrouter.model.spec import padded_vocab_size
from megatron_hyperrouter.planning.held.frozen import frozen_of
from megatron_hyperrouter.planning.held.memory import Estimator, Use
from megatron_hyperrouter.planning.held.parameters import Model, model_of, parameters_of_ranks
from megatron_hyperrouter.planning.layouts import (
    ENGINES,
    Candidate,
    Refusal,
    refused,
    structures,
    variants,
    without_layout,
)
from megatron_hyperrouter.planning.step_time import work_of

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.planning.machine import Machine

_REMEDIES = {
    "weights": "increase expert, tensor or pipeline parallelism",
    "gradients": "increase expert, tensor or pipeline parallelism",
    "optimizer": "increase expert, tensor or pipeline parallelism, or use more GPUs",
    "hypernetwork": "set --shard-hypernetwork or --router.shared model, or use a smaller "
    "--router.hypernet-width",
    "activations": "increase tensor or context parallelism, or use a smaller --micro-batch-size",
    "logits": "increase tensor parallelism, or use a smaller --micro-batch-size",
    "buckets": "set a smaller reduce_bucket_size with --deepspeed-config, or use --engine megatron",
}
_WORDS = {"optimizer": "the optimizer state", "buckets": "the gradient buckets"}  # else the part's name
GIB = 2.0**30


@dataclass
class PlannedLayout:
    """A layout that the rules allow, with what it would need."""

    candidate: Candidate
    use: Use
    times: dict[str, float]  # seconds of each part of a step
    seconds: float
    parameters: list[int]
    fits: bool
    verified: list[dict[str, Any]] = field(default_factory=list)  # dry runs of some of its ranks

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        config = self.candidate.config
        samples = global_batch_size(config, self.candidate.world_size)
        return samples * config.model.seq_length / self.seconds

    def as_json(self, named: Collection[str] = ()) -> dict[str, Any]:
        """As the public contract has it; ``named``: settings of the run's file."""
        told: dict[str, Any] = {
            "layout": self.candidate.layout(),
            "fits": self.fits,
            "memory_bytes": self.use.as_bytes(),
            "step_seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "parameters_per_rank": self.parameters,
            "flags": self.candidate.flags(named),
        }
        return told | ({"dry_run": self.verified} if self.verified else {})


@dataclass(frozen=True)
class Plan:
    """What the command shows and writes."""

    layouts: list[PlannedLayout]  # those that fit come first, the fastest of them at the top
    refused: list[Refusal]
    machine: Machine
    model: Model
    gpus: int

    @property
    def fitting(self) -> list[PlannedLayout]:
        """The layouts that fit, the fastest first."""
        return [each for each in self.layouts if each.fits]

    def as_json(self, named: Collection[str] = ()) -> dict[str, Any]:
        """As the public contract has it; ``named``: settings of the run's file."""
        return {
            "layouts": [each.as_json(named) for each in self.layouts],
            "refused": [{"layout": each.layout, "reason": each.reason} for each in self.refused],
            "assumptions": self.machine.assumptions(),
        }


class Planner:
    """Plans layouts of one model on one machine."""

    def __init__(
        self, base: RunConfig, vocab_size: int, machine: Machine, engines: Sequence[str] = ENGINES
    ) -> None:
        """``vocab_size``: ids of the tokenizer, before padding."""
        self.base, self.machine, self.vocab_size, self.engines = base, machine, vocab_size, engines
        self._models: dict[int, tuple[Model, Estimator]] = {}
        self._frozen = frozen_of(base, vocab_size)

    def of_rows(self, config: RunConfig) -> tuple[Model, Estimator]:
        """The model with the rows that the embedding has under this layout."""
        rows = padded_vocab_size(self.vocab_size, config)
        if rows not in self._models:
            model = model_of(config, self.vocab_size)
            self._models[rows] = model, Estimator(model, self._frozen, rows, self.machine)
        return self._models[rows]

    def planned(self, candidate: Candidate) -> PlannedLayout | Refusal:
        """The variant of the layout to show: the fastest allowed one that fits, or the allowed one that
        needs least memory.
        """
        model, estimator = self.of_rows(candidate.config)
        found = []
        for variant in variants(candidate):
            use = estimator.fullest(variant)
            work = work_of(variant, model, self.machine.per_node, self.machine.skew)
            seconds, fits = work.seconds(self.machine), use.total <= self.machine.memory
            found.append(((not fits, seconds if fits else 0.0, use.total), variant, use, work))
        refusals = []
        for (too_large, _, _), variant, use, work in sorted(found, key=lambda each: each[0]):
            if refusal := refused(variant):
                refusals.append(refusal)
                continue
            parameters = parameters_of_ranks(model, variant.config, variant.world_size)
            seconds = work.seconds(self.machine)
            return PlannedLayout(variant, use, work.parts(self.machine), seconds, parameters, not too_large)
        return refusals[0]

    def plan(self, gpus: int) -> Plan:
        """Every layout over this number of GPUs; raises ConfigError if the rules allow no layout."""
        base = without_layout(self.base, gpus)
        refusals: list[Refusal] = []
        planned: list[PlannedLayout] = []
        for each in structures(base, gpus, self.machine.per_node, self.engines):
            made = self.planned(each) if isinstance(each, Candidate) else each
            if isinstance(made, Refusal):
                refusals.append(made)
                continue
            planned.append(made)
            if not made.fits:
                refusals.append(self.too_large(made))
        if not planned:
            raise ConfigError([_nothing_runs(gpus, refusals)])
        planned.sort(key=lambda each: (not each.fits, each.seconds if each.fits else each.use.total))
        return Plan(planned, refusals, self.machine, self.of_rows(base)[0], gpus)

    def too_large(self, made: PlannedLayout) -> Refusal:
        """Why a layout does not fit, and what to do about the largest part."""
        use, part = made.use, made.use.largest()
        word = _WORDS.get(part, part)
        reason = (
            f"needs {use.total / GIB:.1f} GiB, but a GPU has {self.machine.memory / GIB:.1f} GiB; the "
            f"largest part is {word} ({getattr(use, part) / GIB:.1f} GiB), so {_REMEDIES[part]}"
        )
        cause = f"too large for a GPU; the largest part is {word}, so {_REMEDIES[part]}"
        return Refusal(made.candidate.layout(), reason, (cause,))


def _nothing_runs(gpus: int, refusals: Sequence[Refusal]) -> Problem:
    reason = refusals[0].reason if refusals else "the parallel sizes do not divide the number of GPUs"
    return Problem(
        "--gpus",
        gpus,
        f"no layout on this many GPUs is valid; reason for the first layout: {reason}",
        "change the setting that this reason names, or use another number of GPUs",
    )
