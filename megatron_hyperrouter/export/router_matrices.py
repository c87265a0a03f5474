"""Routers as matrices of megatron-core's own router, and which of them can be written in this way.

Legend: ``T`` tokens, ``E`` experts, ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_hyperrouter.checkpoint.weights import read_tensors
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.routing import make_router
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.ops.topk import topk_softmax
from megatron_hyperrouter.routers.base import Router


def routing_matrices(run: RunConfig, folder: Path, *, vocab_size: int) -> Mapping[str, Tensor]:
    """``decoder.layers.N.mlp.router.weight`` -> ``W_ED`` in float32."""
    found: dict[str, Tensor] = {}
    for layer in range(run.model.num_layers):
        router, prefix = (
            make_router(run, layer + 1, vocab_size=vocab_size),
            f"decoder.layers.{layer}.mlp.router.",
        )
        state = read_tensors(folder, [prefix + name for name in router.state_dict()])
        router.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items()})
        try:
            matrix_ED, bias_E = router.linear()
        except NotImplementedError as error:
            raise CheckpointError(
                f"{folder}: {error}",
                remedy="use mhr export-hf --custom-code, because megatron-core supports only linear routers",
            ) from error
        if bias_E is not None or not chooses_by_softmax(router):
            what = (
                "adds a bias to its logits"
                if bias_E is not None
                else "does not compute expert weights by a softmax over the chosen logits"
            )
            raise CheckpointError(
                f"{folder}: router {run.router.name} {what}",
                remedy="use mhr export-hf --custom-code, because megatron-core does not support this router",
            )
        found[f"{prefix}weight"] = matrix_ED.detach()
    return found


def chooses_by_softmax(router: Router) -> bool:
    """Whether it weights experts like megatron-core's router, tested on made-up logits."""
    logits_TE = torch.linspace(-3, 3, 64 * router.num_experts).sin().view(64, router.num_experts) * 4
    k = router.topk_at(0)
    weights_TK, experts_TK = router.choose(logits_TE, k)
    plain, own = topk_softmax(logits_TE, k), (router.scaled(weights_TK), experts_TK)
    return all(torch.equal(a, b) for a, b in zip(plain, own, strict=True))
