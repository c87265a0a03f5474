"""What a checkpoint's manifest says about the run that wrote it, and the differences from another run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_hyperrouter.config.by_role import SPREAD, names_with, values_with
from megatron_hyperrouter.config.derived import global_batch_size, in_effect
from megatron_hyperrouter.config.leaves import shown
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.base import Engine


def run_meta(config: RunConfig, engine: Engine) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it: model sizes, what orders the samples, and the
    layout.
    """
    world_size = engine.place.world_size
    order = values_with(config, Role.ORDER, Role.BATCH) | {
        "global_batch_size": global_batch_size(config, world_size)
    }
    layout = values_with(config, *SPREAD)
    return {"sizes": model_sizes(config), "order": order, "layout": layout | {"world_size": world_size}}


def model_sizes(config: RunConfig) -> dict[str, Any]:
    """The sizes that must be equal in a checkpoint and in the settings, and the router."""
    shapes = {name: in_effect(config, name) for name in names_with(Role.SHAPE)}
    return shapes | {"router.name": config.router.name}


def differences(part: str, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    """What differs in one part of two such mappings, in words."""
    theirs = saved.get(part, {})
    for name, value in ours[part].items():
        value = list(value) if isinstance(value, tuple) else value  # as JSON gives it back
        if (before := theirs.get(name, value)) != value:  # an older checkpoint does not know all settings
            label = "the number of ranks" if name == "world_size" else f"--{name.replace('_', '-')}"
            yield f"{label} was {shown(before)} in the checkpoint and is now {shown(value)}"
