"""This rank's part of a checkpoint under DeepSpeed."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_hyperrouter.engines.state import load_state, load_weights, save_state, save_weights

if TYPE_CHECKING:
    from megatron_hyperrouter.engines.deepspeed.engine import DeepSpeedEngine


def save(engine: DeepSpeedEngine, folder: Path) -> None:
    """Write this rank's files into ``folder``."""
    save_weights(folder, engine.place.rank, engine.holding())
    if engine.host is not None:
        save_state(folder, engine.place.rank, engine.host.optimizer.state_dict())


def load(engine: DeepSpeedEngine, folder: Path, *, weights_only: bool) -> None:
    """Read what :func:`save` wrote; weights from any layout, the rest from the same one."""
    load_weights(folder, engine.holding())
    if engine.host is None:
        return
    optimizer = engine.host.optimizer
    if weights_only:
        if hasattr(optimizer, "refresh_fp32_params"):  # ZeRO: the float32 master weights are copies
            optimizer.refresh_fp32_params()
        return
    state = load_state(folder, engine.place.rank)
    if engine.config.engine.zero_stage == 0 and not engine.config.train.bf16:
        optimizer.load_state_dict(state)
        return
    rank = dist.get_rank(group=optimizer.dp_process_group)
    with contextlib.redirect_stdout(io.StringIO()):  # bf16_optimizer.py prints the name of what it loads
        optimizer.load_state_dict({rank: state}, load_optimizer_states=True, load_from_fp32_weights=True)
