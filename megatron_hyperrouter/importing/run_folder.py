"""Writes imported weights as a run folder, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_hyperrouter.checkpoint.folder import CheckpointFolders
from megatron_hyperrouter.checkpoint.weights import write_weights
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.export.sources import OneProcess
from megatron_hyperrouter.importing.settings import described_run, text_of
from megatron_hyperrouter.model.names import router_parameter
from megatron_hyperrouter.routers.base import Router


def write_run(
    folder: Path,
    run: RunConfig,
    names: Sequence[str],
    read: Callable[[str], Tensor],
    routers: Mapping[int, Router],
    meta: Mapping[str, Any],
) -> None:
    """``config.yaml`` and a checkpoint of step 0 in ``folder``; ``read`` gives a weight by its name, and the
    routers bring their own.
    """

    def write(checkpoint: Path) -> None:
        layers = range(run.model.num_layers)
        prefixes = [f"decoder.layers.{layer}." for layer in layers]
        outside = [name for name in names if not name.startswith("decoder.layers.")]
        write_weights(checkpoint, 0, {name: read(name) for name in outside})
        for layer, prefix in enumerate(prefixes):
            own = [name for name in names if name.startswith(prefix) and router_parameter(name) is None]
            tensors = {name: read(name) for name in own}
            state = routers[layer].state_dict() if layer in routers else {}
            tensors |= {f"{prefix}mlp.router.{name}": tensor for name, tensor in state.items()}
            write_weights(checkpoint, layer + 1, tensors)

    described = described_run(run)
    folders = CheckpointFolders(folder / "checkpoints", OneProcess())
    folders.save(0, write, dict(meta) | described.meta, texts=described.texts)
    (folder / "config.yaml").write_text(text_of(run), encoding="utf-8")
