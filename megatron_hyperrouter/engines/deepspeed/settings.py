"""The JSON configuration that DeepSpeed is given, made from a run's settings."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from megatron_hyperrouter.config.derived import stacks_experts
from megatron_hyperrouter.config.reading.deepspeed_file import load_document
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import ConfigError, Problem

LARGEST_BUCKET = 500_000_000  # DeepSpeed's default: 2 GB of float32 on every rank, whatever the model
_BUCKET_OF_A_RANK = 1 << 20


def zero_stage(config: RunConfig, *, world_size: int) -> int:
    """The stage that DeepSpeed runs.  With one process there is nothing to divide: in float32, ZeRO would
    only copy
    each gradient three times and keep a second copy of each weight.

    Runs with a DeepSpeed file of their own, or with separate experts, keep the stage of the settings.
    """
    alone = world_size == 1 and not config.train.bf16
    if alone and config.engine.deepspeed_config is None and stacks_experts(config):
        return 0
    return config.engine.zero_stage


def bucket_numbers(largest_group: int, data_parallel_size: int) -> int:
    """Numbers in ZeRO's buffer for gradients.  DeepSpeed reduces a larger gradient in its own memory.

    As in Megatron-LM, more ranks get larger buckets, because a message then takes more hops.
    """
    return min(largest_group, LARGEST_BUCKET, _BUCKET_OF_A_RANK * data_parallel_size)


def deepspeed_settings(
    config: RunConfig,
    *,
    data_parallel_size: int,
    largest_group: int = LARGEST_BUCKET,
    stage: int | None = None,
) -> dict[str, Any]:
    """Our settings, with the user's ``--deepspeed-config`` merged in (``config.check`` has refused
    contradictions).

    ``largest_group``: numbers in the largest group of parameters on this rank, all that a bucket has to hold.
    ``stage``: of ZeRO, by default that of the settings.
    """
    train = config.train
    stage = config.engine.zero_stage if stage is None else stage
    bucket = bucket_numbers(largest_group, data_parallel_size)
    global_batch = train.global_batch_size or train.micro_batch_size * data_parallel_size
    made: dict[str, Any] = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": global_batch // (train.micro_batch_size * data_parallel_size),
        "gradient_clipping": config.optimizer.clip_grad if stage else 0.0,  # without ZeRO: optimizer.Clipper
        "steps_per_print": 10**9,  # this project writes to the console itself
        "bf16": {"enabled": train.bf16},
        "zero_optimization": _zero(stage, bucket),
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
        if stage == 0:  # the Clipper would measure a norm that DeepSpeed has clipped
            theirs.pop("gradient_clipping", None)
        return merged(made, theirs)
    return made


@contextlib.contextmanager
def refusals(path: str | None) -> Iterator[None]:
    """ConfigError if DeepSpeed refuses values of the user's ``--deepspeed-config`` in this context."""
    try:
        yield
    except ValueError as error:
        found = getattr(error, "errors", None)  # of pydantic's ValidationError
        if path is None or found is None:
            raise
        raise ConfigError(
            [
                Problem(
                    f"{'.'.join(map(str, each['loc']))} in {path}",
                    json.dumps(each["input"], default=str),
                    f"is refused by DeepSpeed: {each['msg']}",
                    "correct or remove this key",
                )
                for each in found()
            ]
        ) from error


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
