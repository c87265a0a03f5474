"""All layouts of a run over a number of GPUs: those that the rules allow, and the reasons against the
others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_hyperrouter.config.check import problems
from megatron_hyperrouter.config.derived import (
    data_parallel_size,
    expert_tensor_size,
    global_batch_size,
    model_parallel_size,
    replicas,
)
from megatron_hyperrouter.config.leaves import flag, tree_leaves, value_of
from megatron_hyperrouter.config.tree import RunConfig

ENGINES = ("deepspeed", "megatron")
_Recompute = Literal["full", "selective"] | None
# Settings that a layout decides, and that the file may have set differently
_UNSET = (
    "virtual_pipeline_model_parallel_size",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "sequence_parallel",
    "recompute_granularity",
    "zero_stage",
    "use_distributed_optimizer",
    "overlap_param_gather",
)
_MOST_CHUNKS = 4  # of a pipeline rank under the interleaved schedule


@dataclass(frozen=True)
class Candidate:
    """A run's settings laid out over a number of ranks."""

    config: RunConfig
    world_size: int

    @property
    def data_size(self) -> int:
        """Groups of ranks that read different samples."""
        return data_parallel_size(self.config, self.world_size)

    @property
    def replicas(self) -> int:
        """Number of ranks that have the same dense parameters: DP x CP."""
        return replicas(self.config, self.world_size)

    @property
    def expert_replicas(self) -> int:
        """Number of ranks that have the same experts."""
        parallel = self.config.parallel
        over = parallel.pipeline_model_parallel_size * parallel.expert_model_parallel_size
        return max(self.world_size // (over * expert_tensor_size(self.config)), 1)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one rank in a step."""
        samples = global_batch_size(self.config, self.world_size)
        return max(samples // (self.config.train.micro_batch_size * max(self.data_size, 1)), 1)

    @property
    def shards_optimizer(self) -> bool:
        """Whether each rank has a part of the optimizer state only."""
        if self.config.engine.engine == "deepspeed":
            return self.config.engine.zero_stage > 0
        return self.config.optimizer.use_distributed_optimizer

    def layout(self) -> dict[str, object]:
        """Settings by name, and the sizes that follow from them."""
        config, parallel = self.config, self.config.parallel
        told: dict[str, object] = {
            "engine": config.engine.engine,
            "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
            "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
            "context_parallel_size": parallel.context_parallel_size,
            "expert_model_parallel_size": parallel.expert_model_parallel_size,
            "expert_tensor_parallel_size": expert_tensor_size(config),
            "data_parallel_size": self.data_size,
            "sequence_parallel": parallel.sequence_parallel,
            "micro_batch_size": config.train.micro_batch_size,
            "global_batch_size": config.train.global_batch_size,
            "recompute_granularity": config.train.recompute_granularity,
        }
        if config.engine.engine == "deepspeed":
            return told | {"zero_stage": config.engine.zero_stage}
        return told | {"use_distributed_optimizer": config.optimizer.use_distributed_optimizer}

    def flags(self, named: Collection[str] = ()) -> list[str]:
        """The flags of the program that ask for this layout; ``named``: settings of its file, which a flag
        may have to unset.
        """
        words = []
        for name in dict.fromkeys([*self.layout(), *_UNSET]):
            if name == "data_parallel_size":
                continue
            value, default = value_of(self.config, name), tree_leaves()[name].default
            if name in _UNSET and value == default and name not in named:
                continue
            if isinstance(value, bool):
                words.append(flag(name) if value else flag(f"no_{name}"))
            else:
                words += [flag(name), "none" if value is None else str(value)]
        return words


@dataclass(frozen=True)
class Refusal:
    """A layout that cannot run, or does not fit."""

    layout: dict[str, object]
    reason: str
    causes: tuple[str, ...]  # one by one, without the numbers of this layout, to count alike ones


def without_layout(config: RunConfig, gpus: int) -> RunConfig:
    """The same run on one rank without a layout; its global batch size is fixed, because all layouts share
    it.
    """
    plain = type(config.parallel)()
    batch = config.train.global_batch_size or config.train.micro_batch_size * gpus
    return replace(config, parallel=plain, train=replace(config.train, global_batch_size=batch))


def structures(
    base: RunConfig, gpus: int, per_node: int, engines: Sequence[str]
) -> Iterator[Candidate | Refusal]:
    """Each engine with each set of parallel sizes, or why the rules refuse it."""
    for engine in engines:
        for sizes in _sizes(base, engine, gpus, per_node):
            candidate = with_micro_batch(Candidate(_laid_out(base, engine, *sizes), gpus))
            yield refused(candidate) or candidate


def refused(candidate: Candidate) -> Refusal | None:
    """Why the rules refuse a layout; None if they do not."""
    found = problems(candidate.config, world_size=candidate.world_size)
    causes = tuple(f"{problem.field} = {problem.value}: {problem.rule}" for problem in found)
    return Refusal(candidate.layout(), "; ".join(causes), causes) if found else None


def variants(candidate: Candidate) -> Iterator[Candidate]:
    """The same parallel sizes with other ways to save memory: all compute the same step."""
    config, deepspeed = candidate.config, candidate.config.engine.engine == "deepspeed"
    for recompute, shard, micro, chunks in itertools.product(
        _recomputations(config),
        _zero_stages(candidate) if deepspeed else (False, True),
        sorted({config.train.micro_batch_size, 1}, reverse=True),
        (None,) if deepspeed else _chunks(candidate),
    ):
        if deepspeed:
            engine, optimizer = replace(config.engine, zero_stage=int(shard)), config.optimizer
        else:
            engine = config.engine
            optimizer = replace(
                config.optimizer,
                use_distributed_optimizer=bool(shard),
                overlap_param_gather=_overlaps(config, sharded=bool(shard)),
            )
        made = replace(
            config,
            engine=engine,
            optimizer=optimizer,
            parallel=replace(config.parallel, virtual_pipeline_model_parallel_size=chunks),
            train=replace(config.train, recompute_granularity=recompute, micro_batch_size=micro),
        )
        other = Candidate(made, candidate.world_size)
        if chunks is None or not other.micro_batches % config.parallel.pipeline_model_parallel_size:
            yield other


def _sizes(
    base: RunConfig, engine: str, gpus: int, per_node: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """(TP, PP, CP, EP, ETP) whose products divide the number of GPUs; TP and CP stay within a node."""
    counts = [count for count in range(1, gpus + 1) if gpus % count == 0]
    near = [count for count in counts if count <= per_node]
    contexts = near if engine == "megatron" else [1]  # the other engine has none
    stages = [count for count in counts if count <= base.model.num_layers]
    experts = [count for count in counts if count <= base.model.num_experts]
    for tensor, context, stage in itertools.product(near, contexts, stages):
        if gpus % (tensor * context * stage):
            continue
        for expert, share in itertools.product(experts, sorted({1, tensor})):
            if expert * share * stage <= gpus:
                yield tensor, stage, context, expert, share


def _laid_out(
    base: RunConfig, engine: str, tensor: int, stage: int, context: int, expert: int, share: int
) -> RunConfig:
    """``base`` with these sizes."""
    parallel = replace(
        base.parallel,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=stage,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=share,
        sequence_parallel=tensor > 1,
    )
    if engine == "deepspeed":
        host = replace(base.engine, engine="deepspeed", zero_stage=max(base.engine.zero_stage, 1))
        optimizer = replace(
            base.optimizer,
            use_distributed_optimizer=False,
            overlap_param_gather=_overlaps(base, sharded=False),
        )
        if stage > 1:
            host = replace(host, zero_stage=1)
    else:
        host = replace(base.engine, engine="megatron", zero_stage=type(base.engine)().zero_stage)
        optimizer = base.optimizer
    return replace(base, engine=host, optimizer=optimizer, parallel=parallel)


def with_micro_batch(candidate: Candidate) -> Candidate:
    """The largest micro-batch size, up to the given one, with which each rank gets a whole number of
    micro-batches.
    """
    config = candidate.config
    ranks = candidate.world_size // model_parallel_size(config)
    samples = (config.train.global_batch_size or 0) // ranks if ranks else 0
    micro = math.gcd(samples, config.train.micro_batch_size) or config.train.micro_batch_size
    return replace(candidate, config=replace(config, train=replace(config.train, micro_batch_size=micro)))


def _recomputations(config: RunConfig) -> tuple[_Recompute, ...]:
    """Settings for one kind of recomputation apply only to that kind."""
    train = config.train
    if train.recompute_modules:
        return ("selective",)
    if train.recompute_method is not None or train.recompute_num_layers is not None:
        return ("full",)
    return ("selective" if train.recompute_granularity == "selective" else None, "full")


def _overlaps(config: RunConfig, *, sharded: bool) -> bool | None:
    """What is asked for the gathering of weights, of which there is none if all ranks have them whole."""
    asked = config.optimizer.overlap_param_gather
    return False if asked and not sharded else asked


def _zero_stages(candidate: Candidate) -> tuple[int, ...]:
    return (1,) if candidate.config.parallel.pipeline_model_parallel_size > 1 else (1, 2)


def _chunks(candidate: Candidate) -> list[int | None]:
    stages, layers = (
        candidate.config.parallel.pipeline_model_parallel_size,
        candidate.config.model.num_layers,
    )
    if stages == 1:
        return [None]
    more = [count for count in range(2, _MOST_CHUNKS + 1) if layers % (stages * count) == 0]
    return [None, *more]
