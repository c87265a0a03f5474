"""Values that follow from several settings; each is written down once, here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from megatron_hyperrouter.config.leaves import value_of
from megatron_hyperrouter.config.tree import RunConfig


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
    """The value of a setting; where its default follows from other settings, what follows."""
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


def model_parallel_size(config: RunConfig) -> int:
    """Ranks that work on the same samples: TP x PP x CP."""
    parallel = config.parallel
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Groups of ranks that read different samples; 0 where the layout does not fit the ranks."""
    size = model_parallel_size(config)
    return 0 if world_size % size else world_size // size


def global_batch_size(config: RunConfig, world_size: int) -> int:
    """Samples in one optimizer step."""
    return config.train.global_batch_size or config.train.micro_batch_size * data_parallel_size(
        config, world_size
    )


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches of one data-parallel rank in one optimizer step."""
    return global_batch_size(config, world_size) // (
        config.train.micro_batch_size * data_parallel_size(config, world_size)
    )


def may_change_ranks(config: RunConfig) -> bool:
    """Whether a checkpoint of the optimizer may be loaded on another number of ranks: they are data-parallel
    alone, and each has all of the state, or an equal piece of one long row.
    """
    parallel, engine = config.parallel, config.engine
    alone = model_parallel_size(config) == parallel.expert_model_parallel_size == 1
    if engine.engine == "megatron":
        return alone and not config.optimizer.use_distributed_optimizer
    return alone and not config.train.bf16


def resets_documents(config: RunConfig) -> bool:
    """Whether attention or positions start anew with each document."""
    return config.data.reset_attention_mask or config.data.reset_position_ids


def minds_documents(config: RunConfig) -> bool:
    """Whether the engine has to know which token id ends a document."""
    return resets_documents(config) or config.data.eod_mask_loss


def decay_iters(config: RunConfig) -> int:
    """The step at which the learning-rate decay ends."""
    return config.optimizer.lr_decay_iters or config.train.train_iters


def smallest_topk(config: RunConfig) -> int:
    """The smallest k of the whole run; every schedule is monotone."""
    return min(config.model.moe_router_topk, config.topk.topk_start or config.model.moe_router_topk)


def split_shares(split: str) -> tuple[float, float, float]:
    """``969,30,1`` -> shares of training, validation and test that sum to 1; missing ones are 0, as in
    Megatron-LM.

    Raises ValueError with the rule that is broken.
    """
    words = [word.strip() for word in split.split(",")]
    if not all(re.fullmatch(r"\d+(\.\d*)?|\.\d+", word) for word in words) or len(words) > 3:
        raise ValueError("must be up to three non-negative numbers with commas between them")
    shares = [float(word) for word in words] + [0.0] * (3 - len(words))
    total = (
        shares[0] + shares[1] + shares[2]
    )  # sum() compensates for rounding from Python 3.12 on, and could move a split's border
    if not total > 0:
        raise ValueError("must have a share greater than 0")
    return (shares[0] / total, shares[1] / total, shares[2] / total)
