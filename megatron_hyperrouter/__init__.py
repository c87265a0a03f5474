"""Pretraining of sparse mixture-of-experts language models with different routers: HyperRouter and six
others.

The names below are imported when they are first used: ``import megatron_hyperrouter`` does not import
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_hyperrouter.engines.deepspeed.mlp_slot.plug import (
        plug_into_deepspeed as plug_into_deepspeed,
    )
    from megatron_hyperrouter.engines.megatron.plug import megatron_router_builder as megatron_router_builder
    from megatron_hyperrouter.engines.steps import RouterSteps as RouterSteps
    from megatron_hyperrouter.routers import ROUTERS as ROUTERS
    from megatron_hyperrouter.routers import build_router as build_router

__version__ = "0.1.0"

_HOMES = {
    "ROUTERS": "megatron_hyperrouter.routers",
    "RouterSteps": "megatron_hyperrouter.engines.steps",
    "build_router": "megatron_hyperrouter.routers",
    "megatron_router_builder": "megatron_hyperrouter.engines.megatron.plug",
    "plug_into_deepspeed": "megatron_hyperrouter.engines.deepspeed.mlp_slot.plug",
}

__all__ = [
    "ROUTERS",
    "RouterSteps",
    "__version__",
    "build_router",
    "megatron_router_builder",
    "plug_into_deepspeed",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
