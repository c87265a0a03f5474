"""The time of a step: the work of one rank, and the speed of the machine.

A time is a sum of products of an amount of work and a constant of the machine, so a few measured steps
give the constants (``calibration.py``).
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_hyperrouter.config.derived import (
    dense_width,
    expert_tensor_size,
    global_batch_size,
    recomputed_parts,
)
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.planning.held.parameters import Model
from megatron_hyperrouter.planning.held.stages import StageContent, stages_of
from megatron_hyperrouter.planning.layouts import Candidate
from megatron_hyperrouter.planning.machine import Machine


class Work(NamedTuple):
    """The work of one rank in a step, including the bubbles of the pipeline."""

    flops: float
    inside: float  # bytes to other GPUs of its node
    outside: float  # bytes to other nodes
    messages: float

    def seconds(self, machine: Machine) -> float:
        """On this machine."""
        return sum(self.parts(machine).values())

    def parts(self, machine: Machine) -> dict[str, float]:
        """Seconds of each part of the step."""
        return {
            "compute": self.flops / machine.flops,
            "inside": self.inside / machine.inside,
            "outside": self.outside / machine.outside,
            "latency": self.messages * machine.latency,
        }


def work_of(candidate: Candidate, model: Model, per_node: int, skew: float) -> Work:
    """Amounts of one step."""
    config, parallel = candidate.config, candidate.config.parallel
    size, D = (2 if config.train.bf16 else 4), config.model.hidden_size
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    samples, seq = global_batch_size(config, candidate.world_size), config.model.seq_length
    whole = config.train.recompute_granularity == "full"
    again = 1 + _again(model, config) / 3  # the forward pass is a third of a step
    flops = samples * seq * model.size.flops(config.model.moe_router_topk) / candidate.world_size * again
    flops *= _busiest(model, config, stages_of(config))
    held = [model.held(config, stage) for stage in stages_of(config)]
    layers = max(len(stage.layers) for stage in stages_of(config))
    passes = candidate.micro_batches * layers
    own = config.train.micro_batch_size * seq / parallel.context_parallel_size
    inside = outside = messages = 0.0
    experts = parallel.expert_model_parallel_size * expert_tensor_size(config)
    times = 4 + 2 * whole  # there and back, forward and backward
    if experts > 1:
        exchanges = 4 + 2 * (whole or "moe" in recomputed_parts(config))
        sent = exchanges * passes * own / tensor * config.model.moe_router_topk * expert_tensor_size(config)
        volume = sent * D * size * skew
        # of the peers of a rank, those in its node come first
        span = experts * (tensor if expert_tensor_size(config) == 1 and tensor > 1 else 1)
        far = max(0.0, 1 - per_node / span)
        outside += volume * far
        inside += volume * max(1 - far - 1 / experts, 0.0)
        messages += exchanges * passes * (experts - 1)
    if tensor > 1:
        inside += 2 * times * passes * own * D * size * (tensor - 1) / tensor
        messages += 2 * times * passes
    if parallel.context_parallel_size > 1:
        around = parallel.context_parallel_size
        inside += times * passes * own * D * size * (around - 1) / tensor
        messages += times * passes
    bubble = 1.0
    if stages > 1:
        chunks = parallel.virtual_pipeline_model_parallel_size or 1
        bubble += (stages - 1) / (candidate.micro_batches * chunks)
        hops = 2 * candidate.micro_batches * chunks
        far_stage = candidate.world_size // stages >= per_node
        volume = hops * own * D * size / tensor
        inside, outside = inside + volume * (not far_stage), outside + volume * far_stage
        messages += hops
    flops, inside, outside, messages = (each * bubble for each in (flops, inside, outside, messages))
    reduced = max(
        (size + 4)
        * (part.dense * _share(candidate.replicas) + part.expert * _share(candidate.expert_replicas))
        for part in held
    )
    if candidate.world_size > per_node:
        outside += reduced
    else:
        inside += reduced
    messages += 2 * (candidate.replicas > 1) + 2 * (candidate.expert_replicas > 1)
    return Work(flops, inside, outside, messages)


def _again(model: Model, config: RunConfig) -> float:
    """The share of the forward pass that is computed a second time."""
    if config.train.recompute_granularity == "full":
        return 1.0
    parts, D, k = recomputed_parts(config), config.model.hidden_size, config.model.moe_router_topk
    routed = sum(part.experts > 0 for part in model.layers)
    again = 0.0  # parameters that a token passes once more
    if "moe" in parts:
        again += sum(part.experts for part in model.layers) * k / config.model.num_experts
    if "moe" in parts or "shared_experts" in parts:
        again += routed * 3 * D * (config.model.moe_shared_expert_intermediate_size or 0)
    if "mlp" in parts:
        again += (len(model.layers) - routed) * 3 * D * dense_width(config)
    return 6 * again / model.size.flops(k)


def _busiest(model: Model, config: RunConfig, stages: list[StageContent]) -> float:
    """Work of the stage that has most, over the mean: the others wait for it."""
    if len(stages) == 1:
        return 1.0
    share = config.model.moe_router_topk / config.model.num_experts
    layers = [part.cut + part.whole + part.experts * share for part in model.layers]
    attention = model.size.attention / 6 / len(layers)
    output = model.output.cut or model.embedding.cut
    loads = [
        sum(layers[number] + attention for number in stage.layers) + output * stage.last for stage in stages
    ]
    return max(loads) * len(loads) / sum(loads)


def _share(ranks: int) -> float:
    """Fraction of a tensor that a rank sends to reduce it over this number of ranks."""
    return (ranks - 1) / ranks
