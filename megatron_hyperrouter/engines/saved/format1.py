"""Checkpoints of format 1: the state of a rank is one file ``state-RRRRR.pt``, for one layout only.

Such a file has no checksums, so it is read only if the user says that it can be trusted.  Code in it is
not run: only the classes in ``_KNOWN`` are allowed.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from megatron_hyperrouter.errors import CheckpointError, in_words

_LAYOUT = (
    "resume on the layout of the run that wrote the checkpoint, or load only the weights with --finetune"
)

_KNOWN = (  # what the optimizers and generators of both hosts put into such a file in addition to tensors
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",  # written with NumPy 1
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
)


def read_state(
    folder: Path, rank: int, *, ranks: int, trusted: bool, stacked: bool = False
) -> dict[str, Any]:
    """``optimizer`` and ``random`` of this rank; refuses another number of ranks, and a checkpoint not
    trusted.

    ``stacked``: the experts of this run are one parameter, and those of the checkpoint are not.
    """
    found = len(list(folder.glob("state-*.pt")))
    if not found:  # of mhr average or mhr import-hf, for example
        raise CheckpointError(
            f"{folder} has weights but no optimizer state",
            remedy="add --no-load-optim to continue with a new optimizer state, or start a new run from the "
            "weights with --finetune and another --run-dir",
        )
    if not trusted:
        raise CheckpointError(
            f"{folder} has format 1, whose optimizer state has no checksums",
            remedy=(
                "add --trust-checkpoint if you trust the author of this checkpoint, or load only the weights "
                "with --finetune"
            ),
        )
    if stacked:  # DeepSpeed's rows would silently be read in another order
        raise CheckpointError(
            f"{folder} has format 1, whose optimizer state lists the experts separately",
            remedy="add --no-moe-grouped-gemm until this run has saved its first checkpoint",
        )
    path = folder / f"state-{rank:05d}.pt"
    if found != ranks:
        raise CheckpointError(
            f"{folder} was written by {found} ranks, but this run has {ranks}", remedy=_LAYOUT
        )
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is damaged and cannot be read", remedy="load an older checkpoint of this run"
        )
    try:
        with torch.serialization.safe_globals(_known()):
            if foreign := torch.serialization.get_unsafe_globals_in_checkpoint(path):
                raise CheckpointError(
                    f"{path} contains code that does not belong in an optimizer state: "
                    f"{', '.join(sorted(foreign))}",
                    remedy="do not use this file; load only the weights with --finetune",
                )
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # for a damaged pickle, torch's reader may raise anything
        raise CheckpointError(
            f"{path} cannot be read: {in_words(error)}", remedy="load an older checkpoint of this run"
        ) from error
    if not isinstance(state, dict) or not {"optimizer", "random"} <= state.keys():
        raise CheckpointError(
            (f"{path} has no optimizer state or no random-generator state"),
            remedy="load an older checkpoint of this run",
        )
    return dict(state)


def _known() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """The objects of ``_KNOWN`` that this machine has, each under its name in the file."""
    found: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
    for full in _KNOWN:
        module, _, name = full.rpartition(".")
        try:
            found.append((getattr(import_module(module), name), full))
        except (ImportError, AttributeError):
            continue  # a library, or a version of it, that this run does not use
    return found
