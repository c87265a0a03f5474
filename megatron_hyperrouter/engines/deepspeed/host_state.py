"""The optimizer state that DeepSpeed keeps on one rank, under any of its optimizers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_hyperrouter.engines.saved.pieces import StatePiece, piece


def pieces(optimizer: Any, named: Iterable[tuple[str, nn.Parameter]]) -> Iterator[StatePiece]:
    """What this rank's optimizer has of the parameters with these global names.

    ZeRO joins the parameters of a group into one row, and gives each data-parallel rank a part of it.
    ``_hp_mapping`` says which numbers of a parameter are in that part, and is None if none are.
    """
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        if isinstance(optimizer, torch.optim.Optimizer):  # ZeRO-0 in float32: torch's own
            yield piece(name, parameter, optimizer, parameter)
        elif (link := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
            adam = optimizer.optimizer
            row = adam.param_groups[link.param_group_index]["params"][0]
            part = (link.hp_fragment_address.start, link.hp_fragment_address.numel)
            yield piece(name, parameter, adam, row, start=link.lp_fragment_address.start, part=part)


def load_format_1(optimizer: Any, state: Any) -> None:
    """Restore DeepSpeed's own ``state_dict``; the model's weights must already be loaded."""
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer.load_state_dict(state)
        return
    # ZeRO takes a list of all ranks' states and reads one of them.
    by_rank = {dist.get_rank(group=optimizer.dp_process_group): state}
    with contextlib.redirect_stdout(io.StringIO()):  # bf16_optimizer.py prints the name of what it loads
        optimizer.load_state_dict(by_rank, load_optimizer_states=True, load_from_fp32_weights=True)


def take_weights_over(optimizer: Any) -> None:
    """Set ZeRO's float32 master weights, which are copies, to the weights of the model."""
    if hasattr(optimizer, "refresh_fp32_params"):
        optimizer.refresh_fp32_params()
