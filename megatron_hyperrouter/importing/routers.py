"""The routers of an imported model: the given one, one that is anchored at it, or a new one.

Legend: ``E`` experts, ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_hyperrouter.config.derived import moe_layers
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.routing import make_router
from megatron_hyperrouter.routers.base import Router
from megatron_hyperrouter.routers.hyper import HyperRouter

_CHOICE_BIAS = "e_score_correction_bias"


def imported_routers(
    run: RunConfig, names: list[str], read: Callable[[str], Tensor], *, vocab_size: int, reset: bool
) -> dict[int, Router]:
    """The router of each MoE layer, by its number from 0; with ``reset``, all routers are newly
    initialised.
    """
    found: dict[int, Router] = {}
    for layer in (number for number, routed in enumerate(moe_layers(run)) if routed):
        router = make_router(run, layer + 1, vocab_size=vocab_size)
        prefix = f"decoder.layers.{layer}.mlp.router."
        if not reset:
            _take(router, read(f"{prefix}weight").float())
            bias = prefix + _CHOICE_BIAS
            if bias in names:
                router.get_buffer("choice_bias_E").copy_(read(bias).float())
        found[layer] = router
    return found


def _take(router: Router, given_ED: Tensor) -> None:
    """Make the router compute ``given_ED x``."""
    if isinstance(router, HyperRouter):
        router.anchor_at(given_ED)
        return
    with torch.no_grad():
        router.get_parameter("weight_ED").copy_(given_ED)
