"""Memory of one rank, estimated from the settings."""

from __future__ import annotations

from megatron_hyperrouter.analysis.size import ModelSize
from megatron_hyperrouter.config.derived import (
    data_parallel_size,
    expert_tensor_size,
    expert_width,
    head_width,
    query_groups,
    stage_layers,
)
from megatron_hyperrouter.config.tree import RunConfig


def state_bytes(config: RunConfig, size: ModelSize, world_size: int) -> float:
    """Weights, gradients and AdamW's state of a rank of the largest stage; layers are taken to be alike."""
    parallel = config.parallel
    share = max(stage_layers(config)) / config.model.num_layers
    stages, tensor = parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size
    experts_over = parallel.expert_model_parallel_size * expert_tensor_size(config)
    dense = (size.lookup + size.others) / tensor * share
    experts = size.experts / experts_over * share
    weights, gradients, optimizer = (2, 4, 12) if config.train.bf16 else (4, 4, 8)
    deepspeed = config.engine.engine == "deepspeed"
    shards_optimizer = (
        config.engine.zero_stage >= 1 if deepspeed else config.optimizer.use_distributed_optimizer
    )
    shards_gradients = deepspeed and config.engine.zero_stage >= 2
    total = 0.0
    for numbers, replicas in (
        (dense, data_parallel_size(config, world_size) * parallel.context_parallel_size),
        (experts, max(world_size // (experts_over * stages), 1)),
    ):
        total += numbers * weights
        total += numbers * gradients / (replicas if shards_gradients else 1)
        total += numbers * optimizer / (replicas if shards_optimizer else 1)
    return total


def activation_bytes(config: RunConfig, rows: int) -> float:
    """What one rank keeps for the backward pass: a rough count of the tensors of each layer."""
    model, parallel, train = config.model, config.parallel, config.train
    stages = parallel.pipeline_model_parallel_size
    tensor = parallel.tensor_model_parallel_size
    tokens = train.micro_batch_size * model.seq_length / parallel.context_parallel_size
    heads = (model.num_attention_heads + 2 * query_groups(config)) * head_width(config)
    width = model.hidden_size
    if train.recompute_granularity == "full":
        numbers = width / (tensor if parallel.sequence_parallel else 1)
    else:
        routed = model.moe_router_topk * (2 * width + 3 * expert_width(config))
        numbers = 6 * width + (heads + 2 * width + routed) / tensor
    layers = max(stage_layers(config))
    in_flight = stages  # micro-batches of the first stage, one after another
    logits = 2 * 4 * tokens * rows / tensor
    return tokens * numbers * layers * in_flight * (2 if train.bf16 else 4) + logits
