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
    """Create the router of one MoE layer.  Its initial weights depend only on ``seed``, ``layer_number`` and
    the options.

    Args:
        name: name of the router, such as ``"hyper"``; ``ROUTERS`` has all names.
        hidden_size: size of the hidden states that the router gets.
        num_experts: number of experts in the layer, over all ranks.
        topk: k, or a function that returns k for a number of completed optimizer steps.
        layer_number: number of the layer in the model, counted from 1.
        seed: random seed.
        aux_loss_coeff: coefficient of the load-balancing loss; 0: no such loss.
        z_loss_coeff: coefficient of the z loss, which keeps logits small; 0: no such loss.
        facts: number of layers, steps and token ids, needed by ``competesmoe`` and ``stablemoe``.
        **options: the options of the router.  The option of ``--router.init-std``, for example, is
            ``init_std``.

    Raises:
        ConfigError: the name or an option is unknown, or a value is out of range.  The message lists all
            problems.
    """
    cls = router_class(name)
    others: dict[str, Any] = {
        "layer_number": layer_number,
        "seed": seed,
        "aux_loss_coeff": aux_loss_coeff,
        "z_loss_coeff": z_loss_coeff,
        "facts": facts,
    }
    sizes: dict[str, Any] = {"hidden_size": hidden_size, "num_experts": num_experts}
    config = make_options(cls, options, **sizes, topk=topk, others=others)
    return cls(config, **sizes, topk=topk, **others)
