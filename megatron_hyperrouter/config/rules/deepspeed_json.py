"""Rules about ``--deepspeed-config``: a JSON file that is merged into our own settings for DeepSpeed, and may
not contradict them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from megatron_hyperrouter.config.derived import accumulation_steps, data_parallel_size, global_batch_size
from megatron_hyperrouter.config.leaves import flag
from megatron_hyperrouter.config.reading.deepspeed_file import KNOWN, SECTIONS, load_document
from megatron_hyperrouter.config.reading.values import nearest
from megatron_hyperrouter.config.rules.base import Rule, broken
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import Problem

ABSENT = object()
REMOVED = (  # DeepSpeed 0.19.8 stops at them, whatever their values (runtime/config.py:81, 119)
    "nebula",
    "compression_training",
    "amp",
    "quantize_training",
    "sparse_gradients",
    "eigenvalue",
    "sparse_attention",
    "elasticity",
    "graph_harvesting",
    "curriculum_learning",
    "progressive_layer_drop",
    "zero_optimization.mics_shard_size",
    "zero_optimization.mics_hierarchical_params_gather",
    "zero_optimization.zeropp_loco_param",
)


def deepspeed_json(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The file must exist, and must not contradict a flag."""
    path = config.engine.deepspeed_config
    if path is None or config.engine.engine != "deepspeed":
        return
    try:
        document = load_document(path)
    except ValueError as error:
        yield broken(config, "deepspeed_config", str(error), "give a JSON file with DeepSpeed settings")
        return
    for key in ("optimizer", "scheduler"):
        if key in document:
            remedy = "remove this key and use flags such as --lr, or set its values to auto"
            yield Problem(f"{key} in {path}", json.dumps(document[key]), "is controlled by flags", remedy)
    yield from _sections(document, path)
    yield from _unknown_keys(document, path)
    for key, expected, name in expectations(config, world_size):
        value = at(document, key)
        # 1 == True in Python
        agrees = value == expected and isinstance(value, bool) == isinstance(expected, bool)
        if value is not ABSENT and not agrees:
            remedy = f"remove this key, or make it agree with {flag(name)}"
            yield Problem(
                f"{key} in {path}",
                json.dumps(value),
                f"contradicts the flags, which set it to {json.dumps(expected)}",
                remedy,
            )
    yield from _keys_that_cannot_run(document, path)
    for key in ("pipeline.pipe_partitioned", "pipeline.grad_partitioned"):
        if at(document, key) not in (ABSENT, False) and config.parallel.pipeline_model_parallel_size > 1:
            rule = "cannot be combined with pipeline parallelism"
            yield Problem(f"{key} in {path}", json.dumps(at(document, key)), rule, "remove this key")
    if (
        at(document, "zero_optimization.contiguous_gradients") is False
        and config.parallel.expert_model_parallel_size > 1
    ):
        name = f"zero_optimization.contiguous_gradients in {path}"
        yield Problem(name, "false", "computes wrong gradients with expert parallelism", "remove this key")


def _sections(document: dict[str, Any], path: str) -> Iterator[Problem]:
    """Sections must be objects.  DeepSpeed ignores bfloat16 beside bf16, which this program always sets."""
    for key in SECTIONS:
        if not isinstance(value := document.get(key, {}), dict):
            yield Problem(f"{key} in {path}", json.dumps(value), "must be a JSON object", "remove this key")
    if "bfloat16" in document:
        rule, remedy = "is ignored by DeepSpeed, because this program sets bf16", "rename this key to bf16"
        yield Problem(f"bfloat16 in {path}", json.dumps(document["bfloat16"]), rule, remedy)


def _unknown_keys(document: dict[str, Any], path: str) -> Iterator[Problem]:
    """Keys that DeepSpeed would silently ignore."""
    for section, known in KNOWN.items():
        inner = document.get(section) if section else document
        for key, value in inner.items() if isinstance(inner, dict) else ():
            name = f"{section}.{key}" if section else key
            if key not in known and name not in REMOVED:
                close = nearest(key, known)
                remedy = f"did you mean {close}?" if close else "remove this key"
                yield Problem(f"{name} in {path}", json.dumps(value), "is not a setting of DeepSpeed", remedy)


def _keys_that_cannot_run(document: dict[str, Any], path: str) -> Iterator[Problem]:
    """Keys with which DeepSpeed would stop, or split the model a second time, for any flags."""
    for key in REMOVED:
        if (value := at(document, key)) is not ABSENT:
            yield Problem(
                f"{key} in {path}", json.dumps(value), "is no longer part of DeepSpeed", "remove this key"
            )
    for key, allowed, rule, remedy in UNFIT:
        value = at(document, key)
        if value is not ABSENT and value != allowed:
            yield Problem(f"{key} in {path}", json.dumps(value), rule, remedy)


UNFIT: tuple[tuple[str, object, str, str], ...] = (  # key, the value that changes nothing, rule, remedy
    (
        "tensor_parallel.autotp_size",
        1,
        "would split the layers a second time",
        "remove this key, and use --tensor-model-parallel-size",
    ),
    (
        "sequence_parallel_size",
        1,
        "is not supported by the deepspeed engine",
        "remove this key, or use --engine megatron with --context-parallel-size",
    ),
    (
        "torch_autocast.enabled",
        False,
        "would mix data types within an expert",
        "remove this key, and use --bf16",
    ),
    (
        "zero_optimization.reduce_scatter",
        True,
        "must be true with mixture-of-experts layers",
        "remove this key",
    ),
)


def expectations(config: RunConfig, world_size: int | None) -> Iterator[tuple[str, object, str]]:
    """Dotted keys that our settings decide: (key, value, name of the setting)."""
    yield "train_micro_batch_size_per_gpu", config.train.micro_batch_size, "micro_batch_size"
    yield "gradient_clipping", config.optimizer.clip_grad, "clip_grad"
    yield "zero_optimization.stage", config.engine.zero_stage, "zero_stage"
    yield "bf16.enabled", config.train.bf16, "bf16"
    yield "fp16.enabled", False, "bf16"
    if config.train.bf16:
        yield "data_types.grad_accum_dtype", "fp32", "bf16"
    if world_size is not None and data_parallel_size(config, world_size):
        yield "train_batch_size", global_batch_size(config, world_size), "global_batch_size"
        yield "gradient_accumulation_steps", accumulation_steps(config, world_size), "global_batch_size"


def at(document: dict[str, Any], dotted: str) -> Any:
    """The value below a dotted key; ABSENT where there is none."""
    value: Any = document
    for key in dotted.split("."):
        if not isinstance(value, dict) or key not in value:
            return ABSENT
        value = value[key]
    return value


RULES: tuple[Rule, ...] = (deepspeed_json,)
