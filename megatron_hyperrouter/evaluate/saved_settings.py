"""The settings in a checkpoint, for tools that only read the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hyperrouter import console
from megatron_hyperrouter.checkpoint.description import SETTINGS, settings_file
from megatron_hyperrouter.config.by_role import quiet
from megatron_hyperrouter.config.cli import load_file
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import CheckpointError, ConfigError
from megatron_hyperrouter.routers import ROUTERS


def settings_of(
    folder: Path, files: Mapping[str, Any], world_size: int, overrides: Mapping[str, object]
) -> RunConfig:
    """The settings of a checkpoint: its layout where it fits these ranks, else data-parallel ranks alone.

    ``files``: those that its manifest lists.
    """
    path = settings_file(folder, files)
    if path is None:
        path = folder.parent.parent / "config.yaml"
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no {SETTINGS} and {path} is missing, so the model cannot be built",
                remedy=f"copy the config.yaml of the run to {path}",
            )
        console.warn(
            f"{folder} was written by an older version of this program and has no {SETTINGS}; using {path}"
        )
    # Settings that only training needs must not prevent an evaluation; faster implementations may need GPUs.
    neutral = {**quiet(Role.START, Role.BATCH, Role.SPEED), **overrides}
    if world_size > 1:
        try:
            return load_file(path, routers=ROUTERS, overrides=neutral, world_size=world_size)
        except ConfigError:  # another number of ranks
            pass
    alone = {**neutral, **quiet(Role.LAYOUT), "shard_hypernetwork": None, **overrides}
    return load_file(path, routers=ROUTERS, overrides=alone, world_size=world_size)
