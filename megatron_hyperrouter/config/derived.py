"""Values that follow from several settings; each is defined once, here."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from megatron_hyperrouter.config.kinds import MOST_LAYERS
from megatron_hyperrouter.config.leaves import value_of
from megatron_hyperrouter.config.schedules.batch_sizes import BatchSizes, grows_to
from megatron_hyperrouter.config.tree import RunConfig

NO_DATA = "no-data-yet"  # in place of --data-path, in a run that was imported without data


def query_groups(config: RunConfig) -> int:
    """Key/value heads."""
    return config.model.num_query_groups or config.model.num_attention_heads


def head_width(config: RunConfig) -> int:
    """Channels of one attention head."""
    return config.model.kv_channels or config.model.hidden_size // config.model.num_attention_heads


def dense_width(config: RunConfig) -> int:
    """Hidden units of a dense feed-forward layer."""
    return config.model.ffn_hidden_size or 4 * config.model.hidden_size


def expert_width(config: RunConfig) -> int:
    """Hidden units of one expert."""
    return config.model.moe_ffn_hidden_size or dense_width(config)


def in_effect(config: RunConfig, name: str) -> Any:
    """The value of a setting, or the default that other settings determine."""
    follow = FOLLOWS.get(name)
    return value_of(config, name) if follow is None else follow(config)


FOLLOWS: Mapping[str, Callable[[RunConfig], int]] = {
    "num_query_groups": query_groups,
    "kv_channels": head_width,
    "ffn_hidden_size": dense_width,
    "moe_ffn_hidden_size": expert_width,
}


def expert_tensor_size(config: RunConfig) -> int:
    """Ranks that share one expert."""
    return config.parallel.expert_tensor_parallel_size or config.parallel.tensor_model_parallel_size


def stacks_experts(config: RunConfig) -> bool:
    """Whether our own grouped products compute the experts; Transformer Engine has its own.

    Their rows begin at multiples of 16 bytes; experts of other sizes are computed in a loop.
    """
    if not config.engine.moe_grouped_gemm or config.engine.transformer_impl == "transformer_engine":
        return False
    numbers = 8 if config.train.bf16 else 4
    return not (
        config.model.hidden_size % numbers or expert_width(config) // expert_tensor_size(config) % numbers
    )


# Names of Megatron-LM for --recompute-modules, and why they are not recomputed here.
NOT_RECOMPUTED: Mapping[str, str] = MappingProxyType(
    {
        "layernorm": "megatron-core can recompute this part only with Transformer Engine",
        "moe_act": "only the experts of Transformer Engine can recompute this part",
        "mla_up_proj": "the backward pass of attention needs the result of this part anyway",
    }
)


def recomputed_parts(config: RunConfig) -> tuple[str, ...]:
    """The parts of a layer that selective recomputation computes again; empty without it."""
    if config.train.recompute_granularity != "selective":
        return ()
    parts = config.train.recompute_modules or ("core_attn",)
    return tuple(part for part in parts if part not in NOT_RECOMPUTED)


def model_parallel_size(config: RunConfig) -> int:
    """Ranks that work on the same samples: TP x PP x CP."""
    parallel = config.parallel
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def has_uneven_stages(config: RunConfig) -> bool:
    """Whether the settings name the layers of the first or the last pipeline stage."""
    parallel = config.parallel
    named = (parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers)
    return named != (None, None)


def stage_layers(config: RunConfig) -> tuple[int, ...]:
    """Layers of each pipeline stage.  Stages without a given number share the rest; earlier stages get one
    more if it does not divide evenly.  Raises ValueError if too few or too many layers are named.
    """
    parallel, stages = config.parallel, config.parallel.pipeline_model_parallel_size
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    rest = config.model.num_layers - (first or 0) - (last or 0)
    others = stages - (first is not None) - (last is not None)
    if others < 0 or rest < others or (rest and not others):
        too_few = "the pipeline stages need more layers than the model has"
        raise ValueError(too_few if rest < others else f"{rest} layers are in no pipeline stage")
    shared = [rest // others + (stage < rest % others) for stage in range(others)]
    return (*([first] if first else []), *shared, *([last] if last else []))


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Groups of ranks that read different samples; 0 if the layout does not fit the ranks."""
    size = model_parallel_size(config)
    return 0 if world_size % size else world_size // size


def global_batch_size(config: RunConfig, world_size: int) -> int:
    """Samples in one optimizer step, once --rampup-batch-size is over."""
    return config.train.global_batch_size or config.train.micro_batch_size * data_parallel_size(
        config, world_size
    )


def batch_sizes(config: RunConfig, world_size: int) -> BatchSizes:
    """Samples in each optimizer step."""
    return BatchSizes(global_batch_size(config, world_size), config.train.rampup_batch_size)


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches of one data-parallel rank in one optimizer step of the full size."""
    return global_batch_size(config, world_size) // (
        config.train.micro_batch_size * data_parallel_size(config, world_size)
    )


def replicas(config: RunConfig, world_size: int) -> int:
    """Ranks that have the same dense parameters: DP x CP."""
    return data_parallel_size(config, world_size) * config.parallel.context_parallel_size


class Overlap(NamedTuple):
    """The communication of megatron-core's data parallelism that runs beside the computation."""

    gradients: bool  # their reduction, beside the backward pass
    weights: bool  # their gathering, beside the forward pass


def has_idle_output(config: RunConfig) -> bool:
    """Whether a tied output matrix of megatron-core's last pipeline stage gets no gradient: with multi-token
    prediction, that stage uses its copy of the embedding instead (gpt_model.py:249, 718).
    """
    model = config.model
    several = config.parallel.pipeline_model_parallel_size > 1
    return several and model.mtp_num_layers is not None and not model.untie_embeddings_and_output_weights


def overlap(config: RunConfig, world_size: int) -> Overlap:
    """Which communication overlaps on the megatron engine: the settings, or by default everything that the
    distributed optimizer communicates, if each parameter gets a gradient.  Weights overlap only if gradients
    do.
    """
    settings = config.optimizer
    gradients, weights = settings.overlap_grad_reduce, settings.overlap_param_gather
    if gradients is None:
        several = replicas(config, world_size) > 1
        by_default = settings.use_distributed_optimizer and several and not has_idle_output(config)
        gradients = bool(weights) or by_default
    if weights is None:
        weights = gradients and settings.use_distributed_optimizer
    return Overlap(gradients, weights)


def has_hypernetwork(config: RunConfig) -> bool:
    """Whether the router is generated by a frozen hypernetwork."""
    return hasattr(config.router.options, "hypernet_width")


def hypernetwork_parts(config: RunConfig, world_size: int) -> int:
    """Number of equal parts of the hypernetwork, one on each of the ranks with the same dense parameters;
    1: each of them has all of it.

    The columns of the hidden size are divided.  By default, only a large hypernetwork is divided.
    """
    asked, sizes = config.engine.shard_hypernetwork, config.model
    if asked is False or not has_hypernetwork(config):
        return 1
    ranks = replicas(config, world_size)
    if asked is None:
        large = config.router.options.is_large(hidden_size=sizes.hidden_size, num_experts=sizes.num_experts)
        return ranks if large and ranks and not sizes.hidden_size % ranks else 1
    return ranks


def resets_documents(config: RunConfig) -> bool:
    """Whether the attention mask or the position ids restart at each document."""
    return config.data.reset_attention_mask or config.data.reset_position_ids


def separates_documents(config: RunConfig) -> bool:
    """Whether the engine has to know which token id ends a document."""
    return resets_documents(config) or config.data.eod_mask_loss


def run_length(config: RunConfig) -> int:
    """Steps of the run as the learning rate counts them: in steps with the full batch."""
    rampup, full = config.train.rampup_batch_size, config.train.global_batch_size
    if rampup is None or full is None or not grows_to(full, rampup):  # a rule reports it
        return config.train.train_iters
    return math.ceil(batch_sizes(config, 1).progress(config.train.train_iters))


def decay_iters(config: RunConfig) -> int:
    """The step at which the learning-rate decay ends."""
    return config.optimizer.lr_decay_iters or run_length(config)


def smallest_topk(config: RunConfig) -> int:
    """The smallest k of the whole run; every schedule is monotone."""
    return min(config.model.moe_router_topk, config.topk.topk_start or config.model.moe_router_topk)


def split_shares(split: str) -> tuple[float, float, float]:
    """``969,30,1`` -> shares of training, validation and test that sum to 1; missing ones are 0, as in
    Megatron-LM.

    Raises ValueError with the rule that is broken.
    """
    words = [word.strip() for word in split.strip("'\"").split(",")]  # a shell array may leave the quotes
    if not all(re.fullmatch(r"\d+(\.\d*)?|\.\d+", word) for word in words) or len(words) > 3:
        raise ValueError("must be one to three numbers >= 0, separated by commas")
    shares = [float(word) for word in words] + [0.0] * (3 - len(words))
    # sum() compensates for rounding from Python 3.12 on, and could move the boundary of a split
    total = shares[0] + shares[1] + shares[2]
    if not total > 0:
        raise ValueError("must have at least one number greater than 0")
    return (shares[0] / total, shares[1] / total, shares[2] / total)


def pattern(text: str) -> int | tuple[int, ...]:
    """``2`` -> 2; ``[0,1,1]`` or ``([0]*1+[1]*2)`` -> (0, 1, 1): Megatron-LM's forms of a pattern of layers.

    Raises ValueError with the rule that is broken.
    """
    try:
        value = _evaluated(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            "must be an integer, or a list of zeros and ones such as [0,1,1] or ([0]*1+[1]*26)"
        ) from error
    if isinstance(value, int):
        if value < 1:
            raise ValueError("must be at least 1")
        return value
    if not set(value) <= {0, 1}:
        raise ValueError("must contain only zeros and ones")
    return tuple(value)


def _evaluated(node: ast.expr) -> int | list[int]:
    """The value of an expression of integers, lists, + and *; raises ValueError for any other expression."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        items = [item for item in map(_evaluated, node.elts) if isinstance(item, int)]
        if len(items) == len(node.elts):
            return items
    if isinstance(node, ast.BinOp):
        left, right = _evaluated(node.left), _evaluated(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult):
            if isinstance(left, int):
                left, right = right, left
            if isinstance(left, list) and isinstance(right, int) and len(left) * right <= MOST_LAYERS:
                return left * right
    raise ValueError("not a pattern")


def moe_layers(config: RunConfig) -> tuple[bool, ...]:
    """For each layer whether it has experts; the others have one dense MLP. Raises as :func:`pattern`."""
    layers, found = config.model.num_layers, pattern(config.model.moe_layer_freq)
    if isinstance(found, int):
        return tuple(layer % found == 0 for layer in range(layers))
    if len(found) != layers:
        raise ValueError(f"must have --num-layers = {layers} entries, not {len(found)}")
    return tuple(map(bool, found))


def has_dense_layers(config: RunConfig) -> bool:
    """Whether some layer has no experts; False for an invalid pattern, which a rule reports."""
    try:
        return not all(moe_layers(config))
    except ValueError:
        return False


def longest_dense_run(config: RunConfig) -> int:
    """The largest number of consecutive layers without experts."""
    layers = "".join("x" if routed else "." for routed in moe_layers(config))
    return max(map(len, layers.split("x")))


def window_width(config: RunConfig) -> int | None:
    """How many tokens before its own a token attends to in a layer with a window; None without windows.

    Raises ValueError with the rule that is broken.
    """
    if config.attention.window_size is None:
        return None
    found = re.fullmatch(r"[(\[]?\s*(\d+)\s*,\s*(-?\d+)\s*[)\]]?", config.attention.window_size.strip())
    if found is None or int(found[2]) != 0:
        raise ValueError("must be LEFT,0, where LEFT is the number of earlier tokens that a token attends to")
    return int(found[1])


def windows(config: RunConfig) -> tuple[int | None, ...]:
    """For each layer how many tokens before its own a token attends to; None: all.

    Raises ValueError with the rule that is broken.
    """
    width, skip, layers = (
        window_width(config),
        config.attention.window_attn_skip_freq,
        config.model.num_layers,
    )
    if width is None or skip is None:
        return (width,) * layers
    limited = pattern(skip)
    if isinstance(limited, int):
        limited = tuple(int(number % limited != 0) for number in range(1, layers + 1))
    if len(limited) != layers:
        raise ValueError(f"must have --num-layers = {layers} entries, not {len(limited)}")
    return tuple(width if each else None for each in limited)


def rope_type(config: RunConfig) -> str:
    """``rope`` or ``yarn``."""
    latent = config.attention.multi_latent_attention
    return config.attention.rope_type or ("yarn" if latent else "rope")


def rotary_channels(config: RunConfig) -> int:
    """Channels of a query or key that rotary positions rotate."""
    if config.attention.multi_latent_attention:
        return config.attention.qk_pos_emb_head_dim
    return int(head_width(config) * config.attention.rotary_percent)


ALARMS = ("collapse", "dead_experts", "imbalance", "entropy", "loss_spike")
ALARM_ACTIONS = ("note", "snapshot", "raise-aux", "stop")


def alarm_actions(words: Sequence[str]) -> dict[str, str]:
    """``("collapse=stop",)`` -> the action of every alarm; ValueError with the rule that is broken."""
    actions = dict.fromkeys(ALARMS, ALARM_ACTIONS[0])
    for word in words:
        name, _, action = word.partition("=")
        if name not in ALARMS or action not in ALARM_ACTIONS:
            names, known = ", ".join(ALARMS), ", ".join(ALARM_ACTIONS)
            raise ValueError(
                f"{word} must be NAME=ACTION, where NAME is one of {names} and ACTION is one of {known}"
            )
        actions[name] = action
    return actions
