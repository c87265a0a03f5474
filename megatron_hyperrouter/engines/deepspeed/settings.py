"""The JSON configuration that DeepSpeed is given, made from a run's settings."""

from __future__ import annotations

from typing import Any

from megatron_hyperrouter.config.reading.deepspeed_file import load_document
from megatron_hyperrouter.config.tree import RunConfig

LARGEST_BUCKET = 500_000_000  # DeepSpeed's default: 2 GB of float32 on every rank, whatever the model


def deepspeed_settings(
    config: RunConfig, *, data_parallel_size: int, largest_group: int = LARGEST_BUCKET
) -> dict[str, Any]:
    """Our settings, with the user's ``--deepspeed-config`` merged in (``config.check`` has refused
    contradictions).

    ``largest_group``: numbers in the largest group of parameters on this rank, all that a bucket has to hold.
    """
    train = config.train
    global_batch = train.global_batch_size or train.micro_batch_size * data_parallel_size
    made: dict[str, Any] = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": global_batch // (train.micro_batch_size * data_parallel_size),
        "gradient_clipping": config.optimizer.clip_grad
        if config.engine.zero_stage
        else 0.0,  # without ZeRO: optimizer.Clipper
        "steps_per_print": 10**9,  # the console is ours
        "bf16": {"enabled": train.bf16},
        "zero_optimization": _zero(config.engine.zero_stage, min(largest_group, LARGEST_BUCKET)),
        # torch's AdamW, not one of the optimizers that DeepSpeed compiles.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Carrying partitioned activations breaks with tied layers (pipe/engine.py:736).
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if train.bf16:
        made["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.engine.deepspeed_config:
        theirs = load_document(config.engine.deepspeed_config)
        if config.engine.zero_stage == 0:  # the Clipper would measure a norm that DeepSpeed has clipped
            theirs.pop("gradient_clipping", None)
        return merged(made, theirs)
    return made


def _zero(stage: int, bucket: int) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket}
    if stage == 2:  # gradients are reduced while the backward pass continues
        section |= {"overlap_comm": True, "reduce_scatter": True}
    return section


def merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """``theirs`` over ``ours``, section by section."""
    result = dict(ours)
    for key, value in theirs.items():
        mine = result.get(key)
        result[key] = merged(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return result
