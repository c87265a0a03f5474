"""The engine-free room of routers, one method a file.  Every file here is imported, so a new router is a new
file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from megatron_hyperrouter.routers.base import ROUTERS, Router, Routing, RunFacts
from megatron_hyperrouter.routers.options import make_options, router_class

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = ["ROUTERS", "Router", "Routing", "RunFacts", "build_router"]


def build_router(
    name: str,
    *,
    hidden_size: int,
    num_experts: int,
    topk: int | Callable[[int], int],
    layer_number: int = 1,
    seed: int = 1234,
    aux_loss_coeff: float = 0.0,
    z_loss_coeff: float = 0.0,
    facts: RunFacts | None = None,
    **options: Any,
) -> Router:
    """The router ``name`` for one layer; its trainable parameters are drawn from (seed, layer number).

    ``topk``: k, or a function from completed steps to k; ``layer_number`` counts from 1; ``facts``: what
    methods need to know about the run for their schedules or features; ``options``: fields of the router's
    ``Config``.

    Raises ConfigError, which lists every problem at once, for an unknown name or option or a value out of
    range.
    """
    cls = router_class(name)
    config = make_options(cls, options, hidden_size=hidden_size, num_experts=num_experts, topk=topk)
    return cls(
        config,
        hidden_size=hidden_size,
        num_experts=num_experts,
        topk=topk,
        layer_number=layer_number,
        seed=seed,
        aux_loss_coeff=aux_loss_coeff,
        z_loss_coeff=z_loss_coeff,
        facts=facts,
    )
