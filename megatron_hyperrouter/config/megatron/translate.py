"""Flags of Megatron-LM with another name or unit here, and how to convert them.

``EARLY`` needs only the flag; ``LATE`` is computed when all settings are known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from megatron_hyperrouter.config.reading.yaml_text import text_of
from megatron_hyperrouter.config.schedules.batch_sizes import BatchSizes, grows_to
from megatron_hyperrouter.errors import BadValue, reason_of
from megatron_hyperrouter.paths import expanded

T = TypeVar("T")

ReadWord = Callable[[str], "str | None"]  # the word that the same source gives to a setting of ours
Settings = dict[str, list[str]]  # our names -> words

_SPLITS = 'write {"train": ["0.3", "a", "0.7", "b"], "valid": ["c"]}'
BALANCING = {"seq_aux_loss": "sequence", "global_aux_loss": "global_batch", "none": "off"}


def score_function(words: list[str], read: ReadWord) -> Settings:
    """Sigmoid scores are divided by their sum over the chosen experts, if there are several."""
    function = _one(words)
    if function != "sigmoid" or read("moe_router_topk") == "1":
        return {"router.score_function": [function]}
    return {"router.score_function": [function], "router.renormalise": ["true"]}


def pre_softmax(words: list[str], read: ReadWord) -> Settings:
    """Sigmoid scores have no softmax: Megatron-Core ignores the flag then."""
    if "sigmoid" in (read("moe_router_score_function"), read("router.score_function")):
        return {}
    return {"router.pre_softmax": words}


def load_balancing_type(words: list[str], read: ReadWord) -> Settings:
    """The set of tokens that the balancing loss covers; "aux_loss" is the micro-batch, as here."""
    if len(words) > 1:
        raise BadValue("names several balancing methods; only one can be used at a time", "use one of them")
    kind = _one(words)
    if kind == "aux_loss":
        return {}
    if kind not in BALANCING:
        remedy = "use aux_loss, seq_aux_loss, global_aux_loss or none"
        raise BadValue("is not supported as a balancing method", remedy)
    return {"router.aux_loss": [BALANCING[kind]]}


def group_query_attention(words: list[str], read: ReadWord) -> Settings:
    """Megatron-LM's default of --num-query-groups is 1."""
    _no_value(words)
    return {} if read("num_query_groups") is not None else {"num_query_groups": ["1"]}


def position_embedding_type(words: list[str], read: ReadWord) -> Settings:
    """Rotary positions, plain or scaled by YaRN."""
    if (kind := _one(words)) not in ("rope", "yarn"):
        raise BadValue("must be rope or yarn: positions are always rotary", "use rope or yarn")
    return {} if kind == "rope" else {"rope_type": [kind]}


def iterations_to_skip(words: list[str], read: ReadWord) -> Settings:
    """Megatron-LM counts completed steps there, so its 0 is step 1."""
    if not words or not all(word.isdecimal() for word in words):
        raise BadValue("must be a list of steps", "write one or more step numbers")
    return {"skip_steps": [str(int(word) + 1) for word in words]}


def save_retain_interval(words: list[str], read: ReadWord) -> Settings:
    """Keeps the checkpoints of these steps and the newest one."""
    return {"keep_every": [_one(words)], "keep_checkpoints": ["1"]}


def data_args(words: list[str], read: ReadWord) -> Settings:
    """A file with the words of --data-path."""
    found = _text(_one(words)).split()
    if not found:
        raise BadValue("names no data files", "write prefixes, or weights and prefixes, into the file")
    return {"data_path": found}


def per_split_data_args(words: list[str], read: ReadWord) -> Settings:
    """A JSON file with the values of --train-data-path, --valid-data-path and --test-data-path."""
    text = _text(_one(words))
    try:
        parts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadValue(f"is not JSON ({error})", _SPLITS) from error
    if not isinstance(parts, dict) or set(parts) - {"train", "valid", "test"}:
        raise BadValue("must be a JSON object with no other keys than train, valid and test", _SPLITS)
    found: Settings = {}
    for split, blend in parts.items():
        blend = blend.split() if isinstance(blend, str) else [] if blend is None else blend
        if not isinstance(blend, list) or not all(isinstance(word, str | int | float) for word in blend):
            raise BadValue(f"{split} must be a list of prefixes, or of weights and prefixes", _SPLITS)
        found |= {f"{split}_data_path": [str(word) for word in blend]} if blend else {}
    return found


def recompute_activations(words: list[str], read: ReadWord) -> Settings:
    """The short name of selective recomputation."""
    _no_value(words)
    return {"recompute_granularity": ["selective"]}


def checkpoint_activations(words: list[str], read: ReadWord) -> Settings:
    """The old name of full recomputation."""
    _no_value(words)
    return {"recompute_granularity": ["full"]}


def moe_layer_recompute(words: list[str], read: ReadWord) -> Settings:
    """The old name of recomputing the experts; full recomputation has them already."""
    _no_value(words)
    if read("recompute_granularity") == "full":
        return {}
    return {"recompute_granularity": ["selective"], "recompute_modules": ["moe"]}


EARLY: Mapping[str, Callable[[list[str], ReadWord], Settings]] = MappingProxyType(
    {
        "moe-router-score-function": score_function,
        "moe-router-pre-softmax": pre_softmax,
        "moe-router-load-balancing-type": load_balancing_type,
        "group-query-attention": group_query_attention,
        "iterations-to-skip": iterations_to_skip,
        "position-embedding-type": position_embedding_type,
        "save-retain-interval": save_retain_interval,
        "data-args-path": data_args,
        "per-split-data-args-path": per_split_data_args,
        "recompute-activations": recompute_activations,
        "checkpoint-activations": checkpoint_activations,
        "moe-layer-recompute": moe_layer_recompute,
    }
)


def train_samples(count: float, values: Mapping[str, Any], batch: int) -> tuple[str, int]:
    """Steps that fit the samples (training.py, ``update_train_iters``)."""
    sizes = _sizes(values, batch)
    if count < sizes.size(0):
        raise BadValue(
            f"must be at least one global batch of {sizes.size(0)} samples", f"use {sizes.size(0)} or more"
        )
    return "train_iters", sizes.steps_within(int(count))


def lr_decay_samples(count: float, values: Mapping[str, Any], batch: int) -> tuple[str, int]:
    """The nearest step."""
    return "lr_decay_iters", max(round(count / batch), 1)


def lr_wsd_decay_samples(count: float, values: Mapping[str, Any], batch: int) -> tuple[str, int]:
    """The nearest step."""
    return "lr_wsd_decay_iters", max(round(count / batch), 1)


def lr_warmup_samples(count: float, values: Mapping[str, Any], batch: int) -> tuple[str, int]:
    """Rounded to the nearest step."""
    return "lr_warmup_iters", round(count / batch)


def lr_warmup_fraction(share: float, values: Mapping[str, Any], batch: int) -> tuple[str, int]:
    """A share of the steps until the decay ends."""
    if not share <= 1:
        raise BadValue("must be at most 1", "give a fraction of the decay steps, from 0 to 1")
    run = _sizes(values, int(values["global_batch_size"] or 1)).progress(values["train_iters"])
    return "lr_warmup_iters", round(share * (values["lr_decay_iters"] or run))


def layers_per_chunk(count: float, values: Mapping[str, Any], batch: int) -> tuple[str, int | None]:
    """Layers of a stage / layers of a chunk; one stage has nothing to interleave."""
    chunk = _whole(count)
    stages = int(values["pipeline_model_parallel_size"])
    layers = int(values["num_layers"])
    if stages == 1:
        return "virtual_pipeline_model_parallel_size", None
    if values["decoder_first_pipeline_num_layers"] or values["decoder_last_pipeline_num_layers"]:
        rule = "cannot be combined with pipeline stages of different sizes"
        raise BadValue(rule, "use --num-virtual-stages-per-pipeline-rank instead")
    if not chunk or layers % (stages * chunk):
        rule = f"must divide the number of layers in a pipeline stage ({layers} layers, {stages} stages)"
        raise BadValue(rule, "use --virtual-pipeline-model-parallel-size instead")
    return "virtual_pipeline_model_parallel_size", layers // stages // chunk


def ckpt_step(step: float, values: Mapping[str, Any], batch: int) -> tuple[str, str]:
    """The folder of that step in the run that --load names."""
    if values["load"] is None:
        raise BadValue("needs --load", "add --load with the run folder")
    folder = Path(values["load"])
    inner = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    return "load", str(inner / f"step_{_whole(step):07d}")


# In the order in which they are worked out.
LATE: Mapping[str, Callable[[float, Mapping[str, Any], int], tuple[str, Any]]] = MappingProxyType(
    {
        "train-samples": train_samples,
        "lr-decay-samples": lr_decay_samples,
        "lr-wsd-decay-samples": lr_wsd_decay_samples,
        "lr-warmup-samples": lr_warmup_samples,
        "lr-warmup-fraction": lr_warmup_fraction,
        "num-layers-per-virtual-pipeline-stage": layers_per_chunk,
        "ckpt-step": ckpt_step,
    }
)
SETS: Mapping[str, str] = MappingProxyType(  # flag -> the setting of ours that it becomes
    {
        "train-samples": "train_iters",
        "lr-decay-samples": "lr_decay_iters",
        "lr-wsd-decay-samples": "lr_wsd_decay_iters",
        "lr-warmup-samples": "lr_warmup_iters",
        "lr-warmup-fraction": "lr_warmup_iters",
        "num-layers-per-virtual-pipeline-stage": "virtual_pipeline_model_parallel_size",
        "ckpt-step": "load",
    }
)
WITHOUT_BATCH = ("lr-warmup-fraction", "num-layers-per-virtual-pipeline-stage", "ckpt-step")


def in_order(pending: Mapping[str, T]) -> Iterator[tuple[str, T]]:
    """The flags to convert, in the order of conversion."""
    return ((name, pending[name]) for name in LATE if name in pending)


def worked_out(
    name: str, words: list[str], values: Mapping[str, Any], world_size: int | None
) -> tuple[str, Any]:
    """The setting of ours that flag ``name`` is, and its value; raises :class:`BadValue`."""
    batch = 1 if name in WITHOUT_BATCH else _global_batch(values, world_size)
    return LATE[name](_number(words), values, batch)


def _sizes(values: Mapping[str, Any], batch: int) -> BatchSizes:
    """The samples of each step; an invalid ramp-up is ignored here, because a rule reports it."""
    rampup = values["rampup_batch_size"]
    return BatchSizes(batch, rampup if rampup and grows_to(batch, rampup) else None)


def _global_batch(values: Mapping[str, Any], world_size: int | None) -> int:
    if given := values["global_batch_size"]:
        return int(given)
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    ranks = 0 if world_size is None else world_size // math.prod(values[name] for name in sizes)
    if not ranks:
        raise BadValue("needs --global-batch-size", "add --global-batch-size")
    return ranks * int(values["micro_batch_size"])


def _number(words: list[str]) -> float:
    """The number that a flag gives; raises :class:`BadValue`."""
    word = _one(words)
    try:
        value = float(word)
    except ValueError as error:
        raise BadValue("must be a number", "give a number") from error
    if not 0 <= value < float("inf"):
        raise BadValue("must be a finite number >= 0", "give a number")
    return value


def _whole(number: float) -> int:
    if number != int(number):
        raise BadValue("must be an integer", "give an integer")
    return int(number)


def _one(words: list[str]) -> str:
    if len(words) != 1:
        raise BadValue(f"takes one value, got {len(words)}", "give one value")
    return words[0]


def _no_value(words: list[str]) -> None:
    """Refuse a value after a switch; "false" would not switch it off."""
    if [word.lower() for word in words] not in ([], ["true"]):
        raise BadValue("takes no value", "write the flag without a value, or leave it out")


def _text(path: str) -> str:
    try:
        return text_of(expanded(path))
    except (OSError, UnicodeDecodeError) as error:
        raise BadValue(f"cannot be read ({reason_of(error)})", "name an existing text file") from error
