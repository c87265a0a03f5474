"""The optimizer state that megatron-core keeps on one rank: float32 weights and Adam's moments, plain or
distributed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hyperrouter.engines.state import as_many_ranks, load_state, load_states, save_state
from megatron_hyperrouter.errors import CheckpointError


def save(optimizer: Any, folder: Path, rank: int, *, layers: str) -> None:
    """Write this rank's file into ``folder``; ``layers``: whose layers the model has, which decides the order
    of its parameters.
    """
    save_state(folder, rank, {"layers": layers, "parts": [_state(part) for part in _parts(optimizer)]})


def load(optimizer: Any, folder: Path, rank: int, *, layers: str) -> None:
    """Read what :func:`save` wrote, on the same layout or on another number of ranks that all hold the same.

    The model's weights must be there already.
    """
    state = load_state(folder, rank) if as_many_ranks(folder) else load_states(folder, rank)[0]
    if state["layers"] != layers:
        raise CheckpointError(
            f"{folder} was written with --transformer-impl {state['layers']}, and this run has {layers}",
            remedy=f"add --transformer-impl {state['layers']}, or load weights alone with --finetune",
        )
    saved, parts = state["parts"], list(_parts(optimizer))
    if len(saved) != len(parts):
        raise CheckpointError(
            f"{folder}: {len(saved)} optimizers in the checkpoint, {len(parts)} in this run",
            remedy="resume on the layout of the run that wrote it, or load weights alone with --finetune",
        )
    for part, state in zip(parts, saved, strict=True):
        _restore(part, state)


def _parts(optimizer: Any) -> Iterator[Any]:
    """megatron-core chains one optimizer for dense and one for expert parameters; a part without parameters
    has no torch optimizer.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "optimizer", None) is not None and not getattr(part, "is_stub_optimizer", False):
            yield part


def _state(part: Any) -> dict[str, Any]:
    """For each parameter that the optimizer updates (float32, this rank's piece) its value and its moments,
    in order.

    torch's AdamW counts steps for each parameter; apex's and Transformer Engine's, which megatron-core
    prefers, for each group.
    """
    adam = part.optimizer
    parameters = [
        {
            "value": parameter.detach().cpu().clone(),
            **{key: _copied(value) for key, value in adam.state[parameter].items()},
        }
        for group in adam.param_groups
        for parameter in group["params"]
    ]
    return {"parameters": parameters, "steps": [_copied(group.get("step")) for group in adam.param_groups]}


def _restore(part: Any, state_of_part: dict[str, Any]) -> None:
    adam, saved = part.optimizer, state_of_part["parameters"]
    parameters = [parameter for group in adam.param_groups for parameter in group["params"]]
    shapes = [tuple(state["value"].shape) for state in saved]
    if shapes != [tuple(parameter.shape) for parameter in parameters]:
        raise CheckpointError(
            "the optimizer's parameters in the checkpoint have other shapes than in this run",
            remedy="resume on the layout of the run that wrote it, or load weights alone with --finetune",
        )
    for group, step in zip(adam.param_groups, state_of_part["steps"], strict=True):
        if step is not None:
            group["step"] = step
    for parameter, state in zip(parameters, saved, strict=True):
        value = state.pop("value")
        with torch.no_grad():
            parameter.copy_(value)
        adam.state[parameter] = {
            key: moved.to(parameter.device) if isinstance(moved, Tensor) and key != "step" else moved
            for key, moved in state.items()
        }


def _copied(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
