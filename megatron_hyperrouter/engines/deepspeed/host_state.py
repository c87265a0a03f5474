"""The optimizer state that DeepSpeed keeps on one rank, under any of its optimizers."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hyperrouter.engines.state import as_many_ranks, load_state, load_states, save_state
from megatron_hyperrouter.errors import CheckpointError


def save(optimizer: Any, folder: Path, rank: int) -> None:
    """Write this rank's file into ``folder``."""
    save_state(folder, rank, optimizer.state_dict())


def load(optimizer: Any, folder: Path, rank: int) -> None:
    """Read what :func:`save` wrote, on the same layout or on another number of ranks that are data-parallel
    alone.

    The model's weights must be there already.
    """
    state = (
        load_state(folder, rank) if as_many_ranks(folder) else _cut_anew(load_states(folder, rank), optimizer)
    )
    if isinstance(optimizer, torch.optim.Optimizer):  # ZeRO-0 in float32: torch's own
        optimizer.load_state_dict(state)
        return
    # ZeRO takes a list of all ranks' states and reads one of them.
    by_rank = {dist.get_rank(group=optimizer.dp_process_group): state}
    with contextlib.redirect_stdout(io.StringIO()):  # bf16_optimizer.py prints the name of what it loads
        optimizer.load_state_dict(by_rank, load_optimizer_states=True, load_from_fp32_weights=True)


def _cut_anew(states: list[Any], optimizer: Any) -> Any:
    """This rank's state, from those of another number of data-parallel ranks.

    ZeRO lays the parameters of a group end to end, fills up, and gives each rank an equal piece, which is
    saved without the filling.
    """
    if isinstance(optimizer, torch.optim.Optimizer):  # every rank has all of it
        return states[0]
    shuffled = getattr(optimizer, "round_robin_gradients", False)  # in another way for each number of ranks
    if shuffled or not hasattr(optimizer, "single_partition_of_fp32_groups"):
        what = type(optimizer).__name__ + (" with round_robin_gradients" if shuffled else "")
        raise CheckpointError(
            f"the state of a {what} cannot be cut anew for another number of ranks",
            remedy="resume with the number of ranks of the run that wrote it, or load weights alone with "
            "--finetune",
        )
    place = dist.get_rank(group=optimizer.dp_process_group)
    values: list[Tensor] = []
    moments: dict[int, dict[str, Any]] = {}
    for group, present in enumerate(optimizer.single_partition_of_fp32_groups):
        size = present.numel()
        pieces = [state["single_partition_of_fp32_groups"][group] for state in states]
        begin, end = place * size, (place + 1) * size
        values.append(_between(pieces, begin, end))
        (number,) = states[0]["base_optimizer_state"]["param_groups"][group]["params"]
        saved = [state["base_optimizer_state"]["state"][number] for state in states]
        moments[number] = {
            name: _filled(
                _between(
                    [own[name][: len(piece)] for own, piece in zip(saved, pieces, strict=True)], begin, end
                ),
                size,
            )
            if isinstance(value, Tensor) and value.dim()
            else value
            for name, value in saved[0].items()
        }
    base = {**states[0]["base_optimizer_state"], "state": moments}
    return {**states[0], "single_partition_of_fp32_groups": values, "base_optimizer_state": base}


def _between(pieces: list[Tensor], begin: int, end: int) -> Tensor:
    """Elements ``begin`` to before ``end`` of pieces laid end to end; no other element is read."""
    parts, start = [], 0
    for piece in pieces:
        parts.append(piece[max(begin - start, 0) : max(end - start, 0)])
        start += len(piece)
    return torch.cat(parts)


def _filled(piece: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(piece, (0, size - len(piece)))


def take_weights_over(optimizer: Any) -> None:
    """ZeRO's float32 master weights are copies: make them those of the model."""
    if hasattr(optimizer, "refresh_fp32_params"):
        optimizer.refresh_fp32_params()
