"""What the fullest rank of a layout has to hold at the worst moment of a step, in bytes, part by part.

The formulas follow what the engines were seen to allocate (``dry/``); docs/planning.md has the comparison.

Legend: ``T`` tokens of a micro-batch on a rank, ``D`` hidden size, ``K`` active experts, ``V`` rows of the
embedding on a rank.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_hyperrouter.analysis.size import router_on_meta
from megatron_hyperrouter.config.derived import (
    dense_width,
    expert_tensor_size,
    expert_width,
    head_width,
    moe_layers,
    query_groups,
)
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.deepspeed.settings import LARGEST_BUCKET
from megatron_hyperrouter.model.output import chunk_tokens
from megatron_hyperrouter.planning.layouts import Candidate
from megatron_hyperrouter.planning.machine import Machine
from megatron_hyperrouter.planning.parameters import Held, Model
from megatron_hyperrouter.planning.stages import Stage, stages_of
from megatron_hyperrouter.routers.hyper import HypernetRecipe

PARTS = ("weights", "gradients", "optimizer", "hypernetwork", "activations", "logits", "buckets", "reserve")
_FLOAT32 = 4


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


class Frozen(NamedTuple):
    """Bytes of what routers hold beside their parameters."""

    per_layer: float
    shared: float  # once on each rank


def frozen_of(config: RunConfig, vocab_size: int) -> Frozen:
    """Hypernetworks, fixed routers and buffers, all float32 and on every rank."""
    router = router_on_meta(config, vocab_size)
    per_layer = float(sum(each.numel() * each.element_size() for each in router.buffers()))
    recipe = getattr(getattr(router, "frozen", None), "recipe", None)
    if isinstance(recipe, HypernetRecipe):
        width = config.router.options.hypernet_width
        made = recipe.num_experts * (recipe.hidden_size + recipe.bias)
        network = float(_FLOAT32 * (width * (recipe.embedding_size + 1 + made) + made))
        per_layer += _FLOAT32 * (made + width)  # the generated router of this step
        if recipe.name == "hypernet.model":
            return Frozen(per_layer, network)
        return Frozen(per_layer + network, 0.0)
    if recipe is not None:
        per_layer += _FLOAT32 * recipe.num_experts * recipe.hidden_size
    return Frozen(per_layer, 0.0)


class Estimator:
    """Memory of layouts of one model; what they share is worked out once."""

    def __init__(self, model: Model, frozen: Frozen, rows: int, machine: Machine) -> None:
        """``rows``: of the embedding."""
        self.model, self.frozen, self.rows, self.machine = model, frozen, rows, machine

    def fullest(self, candidate: Candidate) -> Use:
        """Of the stage that needs most."""
        stages = stages_of(candidate.config)
        last = len(stages) - 1
        counts = [len(stage.layers) for stage in stages]
        asked = {0, last, min(1, last), counts.index(max(counts))}
        return max((self.of_stage(candidate, stages, number) for number in asked), key=lambda use: use.total)

    def of_stage(self, candidate: Candidate, stages: list[Stage], number: int) -> Use:
        """Of a rank of one stage."""
        config, stage = candidate.config, stages[number]
        held = self.model.held(config, stage)
        routed = moe_layers(config)
        routers = sum(routed[layer] for layer in stage.layers)
        if stage.last and routed[-1]:
            routers += config.model.mtp_num_layers or 0
        weights, gradients, optimizer = _state(candidate, held)
        layers = [_layer(candidate, self.machine.skew, with_experts) for with_experts in (False, True)]
        return Use(
            weights,
            gradients,
            optimizer,
            self.frozen.per_layer * routers + (self.frozen.shared if routers else 0.0),
            _activations(candidate, stages, number, layers, routed),
            _logits(candidate, self.rows) if stage.last else 0.0,
            _buckets(config, held),
            self.machine.reserve,
        )


def _state(candidate: Candidate, held: Held) -> tuple[float, float, float]:
    """Weights, gradients and AdamW's state."""
    config = candidate.config
    bf16 = config.train.bf16
    weight = 2 if bf16 else 4
    gradient = 2 if config.optimizer.grad_reduce_in_bf16 and bf16 else 4
    state = 12 if bf16 else 8
    spread = (candidate.replicas, candidate.expert_replicas) if candidate.shards_optimizer else (1, 1)
    if config.engine.engine == "deepspeed" and not bf16:
        state = 12  # ZeRO's float32 weights are a copy
    optimizer = state * (held.dense / spread[0] + held.expert / spread[1])
    gradients = float(gradient * held.total)
    if config.engine.engine == "deepspeed" and config.engine.zero_stage == 2:
        gradients = gradient * (held.dense / spread[0] + held.expert / spread[1])
    return float(weight * held.total), gradients, optimizer


def _buckets(config: RunConfig, held: Held) -> float:
    """What gradients pass through."""
    if config.engine.engine == "megatron":
        return float((2 if config.train.bf16 else 4) * held.largest)
    bucket = min(LARGEST_BUCKET, max(held.dense, held.expert))
    copies = 2 if config.engine.zero_stage == 2 else 1
    return float(copies * bucket * (2 if config.train.bf16 else 4))


class _Layer(NamedTuple):
    """Bytes of a micro-batch in one layer."""

    kept: float  # until the backward pass
    working: float  # while the layer is computed


def _layer(candidate: Candidate, skew: float, with_experts: bool) -> _Layer:
    config = candidate.config
    size = 2 if config.train.bf16 else 4
    parallel, model, D = config.parallel, config.model, config.model.hidden_size
    tensor = parallel.tensor_model_parallel_size
    T = config.train.micro_batch_size * model.seq_length / parallel.context_parallel_size
    attention = T / tensor * (6 * D + _heads(config))
    if with_experts:
        shares = expert_tensor_size(config)
        routes = T / tensor * model.moe_router_topk * shares
        rows = routes * skew if parallel.expert_model_parallel_size > 1 else routes
        mlp = rows * (D + 2 * expert_width(config) / shares) + routes * D + T / tensor * 2 * D
        if model.moe_shared_expert_intermediate_size:
            mlp += T / tensor * (3 * model.moe_shared_expert_intermediate_size + D)
        working = rows * (3 * D + 4 * expert_width(config) / shares)
    else:
        mlp = T / tensor * (3 * dense_width(config) + D)
        working = T / tensor * 4 * dense_width(config)
    kept, selective = attention + mlp, config.train.recompute_granularity
    if selective == "full":
        return _Layer(size * T / tensor * D, size * (attention + mlp + working))
    return _Layer(size * kept, size * working)


def _heads(config: RunConfig) -> float:
    """Channels of queries, keys, values and outputs of attention that a token keeps."""
    model, latent = config.model, config.attention
    heads = model.num_attention_heads
    if latent.multi_latent_attention:
        query = heads * (latent.qk_head_dim + latent.qk_pos_emb_head_dim)
        return 2 * (2 * query + heads * latent.v_head_dim) + latent.kv_lora_rank
    width = head_width(config)
    qkv = (heads + 2 * query_groups(config)) * width
    return 2 * qkv + heads * width


def _activations(
    candidate: Candidate,
    stages: list[Stage],
    number: int,
    layers: list[_Layer],
    routed: tuple[bool, ...],
) -> float:
    stage = stages[number]
    kept = sum(layers[routed[layer]].kept for layer in stage.layers)
    working = max((layers[routed[layer]].working for layer in stage.layers), default=0.0)
    return kept * _in_flight(candidate, len(stages), number) + working


def _in_flight(candidate: Candidate, stages: int, number: int) -> float:
    """Micro-batches whose activations a stage holds at most."""
    chunks = candidate.config.parallel.virtual_pipeline_model_parallel_size or 1
    if stages == 1:
        return 1.0
    if chunks == 1:
        return float(min(stages - number, candidate.micro_batches))
    passes = stages * (chunks - 1) + 2 * (stages - 1 - number) + 1
    return min(passes, candidate.micro_batches * chunks) / chunks


def _logits(candidate: Candidate, rows: int) -> float:
    """Of the chunk of tokens that the loss has in hand, and the gradient of the output matrix."""
    config = candidate.config
    size = 2 if config.train.bf16 else 4
    T = config.train.micro_batch_size * config.model.seq_length // config.parallel.context_parallel_size
    V = rows // config.parallel.tensor_model_parallel_size
    chunk = min(chunk_tokens(V), T)
    D = config.model.hidden_size
    gradient = V * D * (size if chunk >= T else size + _FLOAT32)
    return float(chunk * V * (size + _FLOAT32) + gradient + 2 * T * D * size)
