"""What the user should know when a run begins: the size of the model, what trains it, and on what data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from megatron_hyperrouter.analysis.size import ModelSize
from megatron_hyperrouter.config.derived import (
    accumulation_steps,
    batch_sizes,
    data_parallel_size,
    global_batch_size,
    moe_layers,
    overlap,
)
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.data.order.blend import parse_blend
from megatron_hyperrouter.data.stream.dataset import Builder
from megatron_hyperrouter.engines.deepspeed.settings import zero_stage

_SIZES = (
    ("pipeline", "pipeline_model_parallel_size"),
    ("tensor", "tensor_model_parallel_size"),
    ("context", "context_parallel_size"),
    ("expert", "expert_model_parallel_size"),
    ("expert tensor", "expert_tensor_parallel_size"),
)


def start_block(
    config: RunConfig, size: ModelSize, *, world_size: int, epoch: int | None
) -> list[tuple[str, str]]:
    """Label and text of each line; ``epoch``: tokens of the training data, None if they are not known."""
    return [
        ("model", _model(config, size)),
        ("router", _router(config)),
        ("device", _device(world_size)),
        ("engine", _engine(config, world_size)),
        ("layout", _layout(config, world_size)),
        ("step", _step(config, world_size)),
        ("data", _data(config, world_size, epoch)),
        ("run folder", config.logging.run_dir),
    ]


def tokens_of_an_epoch(builder: Builder, mixes: Sequence[tuple[int, tuple[str, ...]]]) -> int:
    """Tokens of the training parts of all files of these mixes, each file once."""
    prefixes = {prefix for _, words in mixes for prefix in parse_blend(words, flag="--data-path").prefixes}
    return sum(builder.tokens(builder.open(each), builder.documents(each, 0)) for each in prefixes)


def count(number: float) -> str:
    """Three digits and a unit: ``950``, ``1.23 M``, ``45.6 B``."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:g}"


def _model(config: RunConfig, size: ModelSize) -> str:
    k = config.model.moe_router_topk
    return f"{count(size.total)} parameters, {count(size.active(k))} active at k = {k}"


def _router(config: RunConfig) -> str:
    model, schedule = config.model, config.topk
    k = str(model.moe_router_topk)
    if schedule.topk_schedule != "constant" and schedule.topk_start is not None:
        steps = schedule.topk_schedule_steps or config.train.train_iters
        k = f"{schedule.topk_start} to {k} over {steps:,} steps ({schedule.topk_schedule})"
    routed, layers = sum(moe_layers(config)), model.num_layers
    where = f"{layers}" if routed == layers else f"{routed} of the {layers}"
    return f"{config.router.name}, {model.num_experts} experts in each of {where} layers, k = {k}"


def _device(world_size: int) -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{world_size} x {name}"


def _engine(config: RunConfig, world_size: int) -> str:
    details: list[str] = [config.engine.engine]
    if config.engine.engine == "deepspeed":
        details.append(f"ZeRO stage {zero_stage(config, world_size=world_size)}")
    else:
        details += ["distributed optimizer"] * config.optimizer.use_distributed_optimizer
        details += ["overlapped communication"] * overlap(config, world_size).gradients
    return ", ".join([*details, "bfloat16" if config.train.bf16 else "float32"])


def _layout(config: RunConfig, world_size: int) -> str:
    sizes: Iterable[tuple[str, int]] = (
        ("data", data_parallel_size(config, world_size)),
        *((name, getattr(config.parallel, field) or 1) for name, field in _SIZES),
    )
    cuts = [f"{name} {size}" for name, size in sizes if size > 1]
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    # Not a product: expert parallelism divides the data-parallel ranks once more.
    return f"{ranks}; parallel sizes: {', '.join(cuts)}" if cuts else ranks


def _step(config: RunConfig, world_size: int) -> str:
    samples, length = global_batch_size(config, world_size), config.model.seq_length
    micro_batches = accumulation_steps(config, world_size)
    plural = "es" if micro_batches > 1 else ""
    text = (
        f"{samples * length:,} tokens: {samples:,} samples of {length:,} tokens; "
        f"{micro_batches:,} micro-batch{plural} of {config.train.micro_batch_size:,} per rank"
    )
    if config.train.rampup_batch_size is None:
        return text
    start, increment, until = config.train.rampup_batch_size
    return f"{text}; batch size from {start:,} in steps of {increment:,} over the first {until:,} samples"


def _data(config: RunConfig, world_size: int, epoch: int | None) -> str:
    samples = batch_sizes(config, world_size).samples(config.train.train_iters)
    tokens = samples * config.model.seq_length
    text = f"{config.train.train_iters:,} steps, {count(tokens)} tokens"
    return f"{text}: {tokens / epoch:.3g} epochs of {count(epoch)} training tokens" if epoch else text
