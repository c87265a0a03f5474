"""The size of a trained model and the FLOPs of its training, computed from the weights in its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from megatron_hyperrouter.config.derived import head_width, windows
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.model.names import WORD_EMBEDDINGS, is_expert, router_parameter
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.routers.base import Router, RunFacts

OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class ModelSize:
    """Trainable parameters; frozen parts (hypernetworks, random routers) do not count."""

    lookup: int  # an untied input embedding: a token reads one row of it
    experts: int  # all experts of all layers
    others: int  # attention, norms, routers, output matrix: every token uses them
    num_experts: int
    attention: int  # FLOPs of a token in scores and sums of attention, forward and backward

    @property
    def total(self) -> int:
        """All parameters."""
        return self.lookup + self.experts + self.others

    def active(self, topk: int) -> int:
        """Parameters that a token is multiplied with when each layer sends it to ``topk`` experts."""
        return self.others + self.experts * topk // self.num_experts

    def flops(self, topk: int) -> int:
        """Work of training on a token: 6 for each active parameter, and attention over the tokens before
        it.
        """
        return 6 * self.active(topk) + self.attention

    def training_flops(self, steps: Sequence[Mapping[str, Any]]) -> int:
        """Work of a whole training; ``steps``: the records of its metrics.  The tokens and the k of a step
        can change during training; a step of --skip-steps has no k.
        """
        tokens = [0, *(record["consumed_tokens"] for record in steps)]
        return sum(
            (after - before) * self.flops(record["topk"])
            for (before, after), record in zip(pairwise(tokens), steps, strict=True)
            if "topk" in record
        )


def size_of(config: RunConfig, shapes: Mapping[str, Sequence[int]]) -> ModelSize:
    """``shapes``: of all tensors of a checkpoint, by global name.

    Attention: 6 FLOPs for each channel of a query and of a value, and each of the positions that a token of
    a causal sample sees on average: (S + 1) / 2 without a window.
    """
    trained = trained_in_router(config)
    lookup = experts = others = 0
    for name, shape in shapes.items():
        inside, count = router_parameter(name), math.prod(shape)
        if inside is not None and inside[1] not in trained:
            continue
        if name == WORD_EMBEDDINGS and OUTPUT in shapes:
            lookup += count
        elif is_expert(name):
            experts += count
        else:
            others += count
    return ModelSize(lookup, experts, others, config.model.num_experts, _attention_flops(config))


def _attention_flops(config: RunConfig) -> int:
    """FLOPs of a token for scores and sums over the positions that it attends to, forward and backward."""
    model, length, latent = config.model, config.model.seq_length, config.attention
    channels = 2 * head_width(config)
    if latent.multi_latent_attention:
        channels = latent.qk_head_dim + latent.qk_pos_emb_head_dim + latent.v_head_dim
    seen = 0
    for window in (*windows(config), *(None,) * (model.mtp_num_layers or 0)):
        most = length if window is None else min(window + 1, length)
        seen += most * (most + 1) // 2 + (length - most) * most
    return 6 * model.num_attention_heads * channels * seen // length


def trained_in_router(config: RunConfig) -> set[str]:
    """The names of the trainable parameters in a router."""
    return {name for name, each in router_on_meta(config).named_parameters() if each.requires_grad}


def router_on_meta(config: RunConfig, vocab_size: int = 1) -> Router:
    """A router with these settings on the meta device: only names and shapes.  ``vocab_size``: number of
    token ids; some routers have a row for each.
    """
    facts = RunFacts(
        num_layers=config.model.num_layers, train_iters=config.train.train_iters, vocab_size=vocab_size
    )
    options = config.router.options
    # frozen, so its width does not matter here; drawing a large one takes minutes
    if hasattr(options, "hypernet_width"):
        options = replace(options, hypernet_width=1)
    with torch.device("meta"):
        return ROUTERS[config.router.name](
            options,
            hidden_size=config.model.hidden_size,
            num_experts=config.model.num_experts,
            topk=config.model.moe_router_topk,
            layer_number=1,
            seed=config.train.seed,
            aux_loss_coeff=0.0,
            z_loss_coeff=0.0,
            facts=facts,
        )
