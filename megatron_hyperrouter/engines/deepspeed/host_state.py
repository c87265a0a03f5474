"""The optimizer state that DeepSpeed keeps on one rank, under any of its optimizers."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hyperrouter.engines.state import load_state, save_state


def save(optimizer: Any, folder: Path, rank: int) -> None:
    """Write this rank's file into ``folder``."""
    save_state(folder, rank, optimizer.state_dict())


def load(optimizer: Any, folder: Path, rank: int) -> None:
    """Read what :func:`save` wrote, on the same layout; the model's weights must be there already."""
    state = load_state(folder, rank)
    if isinstance(optimizer, torch.optim.Optimizer):  # ZeRO-0 in float32: torch's own
        optimizer.load_state_dict(state)
        return
    # ZeRO takes a list of all ranks' states and reads one of them.
    by_rank = {dist.get_rank(group=optimizer.dp_process_group): state}
    with contextlib.redirect_stdout(io.StringIO()):  # bf16_optimizer.py prints the name of what it loads
        optimizer.load_state_dict(by_rank, load_optimizer_states=True, load_from_fp32_weights=True)


def take_weights_over(optimizer: Any) -> None:
    """ZeRO's float32 master weights are copies: make them those of the model."""
    if hasattr(optimizer, "refresh_fp32_params"):
        optimizer.refresh_fp32_params()
