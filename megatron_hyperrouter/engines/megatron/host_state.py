"""The optimizer state that megatron-core keeps on one rank: float32 weights and Adam's moments, plain or
distributed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_hyperrouter.engines.saved.pieces import StatePiece, piece
from megatron_hyperrouter.errors import CheckpointError


def pieces(optimizer: Any, named: Iterable[tuple[str, nn.Parameter]]) -> Iterator[StatePiece]:
    """What this rank's optimizer has of the parameters with these global names."""
    names = {parameter: name for name, parameter in named if parameter.requires_grad}
    for part in _parts(optimizer):
        for parameter, main, start in _mains(part):
            yield piece(names[parameter], parameter, part.optimizer, main, start=start)


def _mains(part: Any) -> Iterator[tuple[nn.Parameter, Tensor, int]]:
    """(parameter, the optimizer's own tensor of it, where that begins in the parameter)."""
    if hasattr(part, "shard_fp32_groups"):  # distributed: each rank has a flat range of each parameter
        pairs = [
            *zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True),
            *zip(part.model_fp32_groups, part.shard_fp32_groups, strict=True),
        ]
        for parameters, mains in pairs:
            for parameter, main in zip(parameters, mains, strict=True):
                yield parameter, main, part._get_model_param_range_map(parameter)["param"].start
    elif hasattr(part, "float16_groups"):  # bfloat16 weights with float32 copies
        for parameters, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            for parameter, main in zip(parameters, mains, strict=True):
                yield parameter, main, 0
        for parameters in part.fp32_from_fp32_groups:
            for parameter in parameters:
                yield parameter, parameter, 0
    else:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, parameter, 0


def _parts(optimizer: Any) -> Iterator[Any]:
    """megatron-core chains one optimizer for dense and one for expert parameters; a part without
    parameters has no torch optimizer.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "optimizer", None) is not None and not getattr(part, "is_stub_optimizer", False):
            yield part


def load_format_1(optimizer: Any, state: dict[str, Any], *, layers: str) -> None:
    """Restore the values and moments of each parameter, in order; the model's weights must already be
    loaded.

    ``layers``: the layer implementation of the model, which decides the order of its parameters.
    """
    if state["layers"] != layers:
        raise CheckpointError(
            (
                f"the checkpoint was written with --transformer-impl {state['layers']}, "
                f"but this run uses {layers}"
            ),
            remedy=f"add --transformer-impl {state['layers']}, or load only the weights with --finetune",
        )
    saved, parts = state["parts"], list(_parts(optimizer))
    if len(saved) != len(parts):
        raise CheckpointError(
            f"the checkpoint has {len(saved)} optimizers but this run has {len(parts)}",
            remedy=(
                "resume on the layout of the run that wrote the checkpoint, or load only the weights "
                "with --finetune"
            ),
        )
    for part, state in zip(parts, saved, strict=True):
        _restore(part, state)


def _restore(part: Any, state_of_part: dict[str, Any]) -> None:
    adam, saved = part.optimizer, state_of_part["parameters"]
    parameters = [parameter for group in adam.param_groups for parameter in group["params"]]
    shapes = [tuple(state["value"].shape) for state in saved]
    if shapes != [tuple(parameter.shape) for parameter in parameters]:
        raise CheckpointError(
            "the optimizer parameters in the checkpoint and in this run have different shapes",
            remedy=(
                "resume on the layout of the run that wrote the checkpoint, or load only the weights "
                "with --finetune"
            ),
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
