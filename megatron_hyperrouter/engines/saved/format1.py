"""Checkpoints of format 1: the state of a rank is one file ``state-RRRRR.pt``, which fits its own layout
alone.

Such a file can run any code when it is loaded, so it is read only where the user says that it can be
trusted.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from megatron_hyperrouter.errors import CheckpointError

_LAYOUT = "resume on the layout of the run that wrote it, or load weights alone with --finetune"


def read_state(
    folder: Path, rank: int, *, ranks: int, trusted: bool, stacked: bool = False
) -> dict[str, Any]:
    """``optimizer`` and ``random`` of this rank; refuses another number of ranks, and a checkpoint not
    trusted.

    ``stacked``: the experts of this run are one parameter, and those of the checkpoint are not.
    """
    if not trusted:
        raise CheckpointError(
            f"{folder} is of format 1: loading its optimizer state runs any code that state-*.pt holds",
            remedy="add --trust-checkpoint if you know who wrote it, or load weights alone with --finetune",
        )
    if stacked:  # DeepSpeed's rows would be taken in another order, without a word
        raise CheckpointError(
            f"{folder} is of format 1, whose optimizer state lists the experts one by one",
            remedy="add --no-moe-grouped-gemm until the run has saved a checkpoint of its own",
        )
    path = folder / f"state-{rank:05d}.pt"
    found = len(list(folder.glob("state-*.pt")))
    if found != ranks:
        raise CheckpointError(
            f"{folder} was written by {found} ranks, and this run has {ranks}", remedy=_LAYOUT
        )
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} cannot be read: it is damaged", remedy="load an older checkpoint of the run"
        )
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", remedy="load an older checkpoint of the run"
        ) from error
    if not {"optimizer", "random"} <= state.keys():
        raise CheckpointError(
            f"{path} has no optimizer or no generators", remedy="load an older checkpoint of the run"
        )
    return state
