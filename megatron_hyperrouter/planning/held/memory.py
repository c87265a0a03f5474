"""Peak memory of a step on the rank of a layout that needs most, in bytes, part by part.

The formulas follow what the engines were seen to allocate; docs/planning.md has the comparison.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from megatron_hyperrouter.config.derived import hypernetwork_parts, moe_layers
from megatron_hyperrouter.engines.deepspeed.settings import bucket_numbers, zero_stage
from megatron_hyperrouter.planning.held.activations import activations_of, layer_of, logits_of
from megatron_hyperrouter.planning.held.stages import StageContent, stages_of

if TYPE_CHECKING:
    from megatron_hyperrouter.planning.held.frozen import FrozenBytes
    from megatron_hyperrouter.planning.held.parameters import Held, Model
    from megatron_hyperrouter.planning.layouts import Candidate
    from megatron_hyperrouter.planning.machine import Machine

PARTS = ("weights", "gradients", "optimizer", "hypernetwork", "activations", "logits", "buckets", "reserve")


class Use(NamedTuple):
    """Bytes of a rank by the name of their part."""

    weights: float
    gradients: float
    optimizer: float
    hypernetwork: float
    activations: float
    logits: float
    buckets: float
    reserve: float

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self)

    def largest(self) -> str:
        """The part that takes most, of those that a layout can change."""
        return max(PARTS[:-1], key=lambda name: getattr(self, name))

    def as_bytes(self) -> dict[str, int]:
        """For a report, with the total."""
        return {name: round(value) for name, value in (*self._asdict().items(), ("total", self.total))}


class Estimator:
    """Memory of the layouts of one model; what they have in common is computed once."""

    def __init__(self, model: Model, frozen: FrozenBytes, rows: int, machine: Machine) -> None:
        """``rows``: of the embedding."""
        self.model, self.frozen, self.rows, self.machine = model, frozen, rows, machine

    def fullest(self, candidate: Candidate) -> Use:
        """Of the stage that needs most."""
        stages = stages_of(candidate.config)
        last = len(stages) - 1
        counts = [len(stage.layers) for stage in stages]
        asked = {0, last, min(1, last), counts.index(max(counts))}
        return max((self.of_stage(candidate, stages, number) for number in asked), key=lambda use: use.total)

    def of_stage(self, candidate: Candidate, stages: list[StageContent], number: int) -> Use:
        """Of a rank of one stage."""
        config, stage = candidate.config, stages[number]
        held = self.model.held(config, stage)
        routed = moe_layers(config)
        routers = sum(routed[layer] for layer in stage.layers)
        if stage.last and routed[-1]:
            routers += config.model.mtp_num_layers or 0
        weights, gradients, optimizer = _state(candidate, held)
        layers = [layer_of(candidate, self.machine.skew, with_experts) for with_experts in (False, True)]
        kept, working = activations_of(candidate, stages, number, layers, routed)
        logits = logits_of(candidate, self.rows) if stage.last else 0.0
        buckets, passing = _buckets(candidate, held)
        if logits > working + passing:  # the worst moment is the loss, else the backward pass of a layer
            working = passing = 0.0
        else:
            logits = 0.0
        return Use(
            weights,
            gradients,
            optimizer,
            self.frozen.on_a_rank(
                routers,
                parts=hypernetwork_parts(config, candidate.world_size),
                micro_batches=candidate.micro_batches,
            ),
            kept + working,
            logits,
            buckets + passing,
            self.machine.reserve,
        )


def _state(candidate: Candidate, held: Held) -> tuple[float, float, float]:
    """Weights, gradients and AdamW's state."""
    config = candidate.config
    bf16, deepspeed = config.train.bf16, config.engine.engine == "deepspeed"
    stage = zero_stage(config, world_size=candidate.world_size) if deepspeed else 0
    weight, state = (2, 12) if bf16 else (4, 8)
    gradient = 2 if config.optimizer.grad_reduce_in_bf16 and bf16 else 4
    spread = (candidate.replicas, candidate.expert_replicas) if candidate.shards_optimizer else (1, 1)
    if stage and not bf16:
        weight, state = 8, 12  # ZeRO's rows are copies, in float32 too
    elif stage == 2:
        weight = 4
    elif stage == 1:
        gradient = 6  # those of the weights, and their sum in float32
    part = held.dense / spread[0] + held.expert / spread[1]
    gradients = float(gradient * (part if stage == 2 else held.total))
    return float(weight * held.total), gradients, state * part


def _buckets(candidate: Candidate, held: Held) -> tuple[float, float]:
    """Buffers for gradients: those that always exist, and those that exist while a layer is computed."""
    config = candidate.config
    stage = zero_stage(config, world_size=candidate.world_size)
    size = 2 if config.train.bf16 else 4
    passing = float(size * held.largest)
    if config.engine.engine == "megatron" or stage == 0 or (stage == 1 and config.train.bf16):
        return 0.0, passing
    bucket = bucket_numbers(int(max(held.dense, held.expert)), candidate.data_size)
    if stage == 2:  # two of them, allocated again for each backward pass
        return 0.0, passing + 2.0 * bucket * size
    return float(bucket * size), passing
