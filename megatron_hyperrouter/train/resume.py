"""Where a run begins: from scratch, or after the step of a checkpoint that fits its settings."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hyperrouter import console
from megatron_hyperrouter.checkpoint.folder import CheckpointFolders, find, read_manifest, verify
from megatron_hyperrouter.config.by_role import SPREAD, names_with, values_with
from megatron_hyperrouter.config.derived import global_batch_size, in_effect
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.base import Engine
from megatron_hyperrouter.errors import CheckpointError


def resume(engine: Engine, config: RunConfig, folders: CheckpointFolders) -> int:
    """Load what ``--load`` names into ``engine`` (collective); returns the number of completed steps."""
    step = 0
    if folder := _checkpoint_to_load(config, folders.root, is_main=engine.place.is_main):
        manifest, ours = read_manifest(folder), run_meta(config, engine)
        weights_only = config.checkpoint.finetune
        by_rank = any(name.startswith("state-") for name in manifest["files"])  # format 1 cannot move
        _refuse_misfit(folder, manifest["meta"], ours, same_layout=by_rank and not weights_only)
        verify(folder, engine)
        engine.load(folder, weights_only=weights_only)
        step = 0 if weights_only else int(manifest["step"])
        if engine.place.is_main:
            console.note(
                f"continuing after step {step} of {folder}"
                if step
                else f"starting from the weights of {folder}"
            )
            for line in _differences("layout", manifest["meta"], ours) if step else ():
                console.note(f"{line}: the optimizer state is redistributed")
            for line in _differences("order", manifest["meta"], ours) if step else ():
                if "data" in manifest["meta"]:
                    console.note(f"{line}: the run goes on with what it has not read yet")
                else:
                    console.warn(f"{line}: the run goes on with other samples than the one that was stopped")
    if aside := folders.rewind(step):
        metrics = folders.root.with_name("metrics.jsonl")
        if metrics.exists():
            shutil.copy2(metrics, aside)
        console.warn(
            f"{folders.root.parent} holds checkpoints after step {step}: moved to {aside}, with a copy of "
            "the metrics"
        )
    return step


def past_of(config: RunConfig) -> tuple[list[dict[str, Any]], int]:
    """The ledger of what the checkpoint to continue from had read (see ``data.course``), and its steps; empty
    and 0 for a new run.
    """
    folder = (
        find(Path(config.checkpoint.load))
        if config.checkpoint.load and not config.checkpoint.finetune
        else None
    )
    if folder is None:
        return [], 0
    manifest = read_manifest(folder)
    return list(manifest["meta"].get("data", [])), int(manifest["step"])


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
    """What must be equal in a checkpoint and in the settings, and the router."""
    shapes = {name: in_effect(config, name) for name in names_with(Role.SHAPE)}
    return shapes | {"router.name": config.router.name}


def _checkpoint_to_load(config: RunConfig, own_root: Path, *, is_main: bool) -> Path | None:
    if config.checkpoint.load is None:
        return None
    load = Path(config.checkpoint.load)
    folder = find(load)
    if folder is None:
        # The same command with --load must also continue a run that was killed before its first checkpoint.
        if load.resolve() not in (own_root.resolve(), own_root.parent.resolve()):
            raise CheckpointError(
                f"--load {load}: there is no finished checkpoint",
                remedy="name a run folder, its checkpoints/ or one folder in it, or leave --load out",
            )
        if is_main:
            console.note(f"{load} has no finished checkpoint yet: the run starts from scratch")
    return folder


def _refuse_misfit(folder: Path, saved: dict[str, Any], ours: dict[str, Any], *, same_layout: bool) -> None:
    if lines := list(_differences("sizes", saved, ours)):
        raise CheckpointError(
            "\n  - ".join([f"{folder} holds a model of other sizes:", *lines]),
            remedy="use the settings of the run that wrote it: its config.yaml stands beside checkpoints/",
        )
    if same_layout and (lines := list(_differences("layout", saved, ours))):
        raise CheckpointError(
            "\n  - ".join(
                [f"the optimizer state in {folder} is of format 1, which fits one layout:", *lines]
            ),
            remedy="resume with the layout of the run that wrote it, or load the weights alone with "
            "--finetune",
        )


def _differences(part: str, saved: dict[str, Any], ours: dict[str, Any]) -> Iterator[str]:
    theirs = saved.get(part, {})
    for name, value in ours[part].items():
        if (before := theirs.get(name, value)) != value:  # an older checkpoint does not know all settings
            label = "the number of ranks" if name == "world_size" else f"--{name.replace('_', '-')}"
            yield f"{label} was {before} in the checkpoint and is {value} now"
