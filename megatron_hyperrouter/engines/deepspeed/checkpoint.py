"""This rank's part of a checkpoint under DeepSpeed: weights by global name, optimizer and random state by rank.

DeepSpeed's own files cannot be read on another expert-parallel size; ours hold each weight once, under a name that no layout changes.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hyperrouter.checkpoint.weights import read_tensors, read_weights, write_weights
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.model.names import is_expert, router_parameter

if TYPE_CHECKING:
    from megatron_hyperrouter.engines.deepspeed.engine import DeepSpeedEngine


def save(engine: DeepSpeedEngine, folder: Path) -> None:
    """Write this rank's files into ``folder``."""
    write_weights(folder, engine.place.rank, _owned(engine))
    if engine.host is not None:
        torch.save({"optimizer": engine.host.optimizer.state_dict(), "random": _random_state()}, _state_file(folder, engine.place.rank))


def load(engine: DeepSpeedEngine, folder: Path, *, weights_only: bool) -> None:
    """Read what :func:`save` wrote; weights from any layout, the rest from the same one."""
    _load_weights(engine, folder)
    if engine.host is None:
        return
    optimizer = engine.host.optimizer
    if weights_only:
        if hasattr(optimizer, "refresh_fp32_params"):  # ZeRO: the float32 master weights are copies
            optimizer.refresh_fp32_params()
        return
    state = _read_state(_state_file(folder, engine.place.rank))
    if engine.config.engine.zero_stage == 0 and not engine.config.train.bf16:
        optimizer.load_state_dict(state["optimizer"])
    else:
        rank = dist.get_rank(group=optimizer.dp_process_group)
        with contextlib.redirect_stdout(io.StringIO()):  # bf16_optimizer.py prints the name of what it loads
            optimizer.load_state_dict({rank: state["optimizer"]}, load_optimizer_states=True, load_from_fp32_weights=True)
    _set_random_state(state["random"])


def _owned(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Global name -> tensor, for what this rank writes: the first replica of each."""
    owned: dict[str, Tensor] = {}
    for name, tensor in _tensors(engine).items():
        if engine.owns_experts if is_expert(name) else engine.owns_dense:
            owned[name] = tensor
    return owned


def _tensors(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {name: parameter for name, parameter in engine.named_parameters() if router_parameter(name) is None}
    for prefix, router in engine.routers.items():
        tensors.update({prefix + name: tensor for name, tensor in router.state_dict().items()})
    return tensors


def _load_weights(engine: DeepSpeedEngine, folder: Path) -> None:
    targets = _tensors(engine)
    routers = {prefix: router.state_dict() for prefix, router in engine.routers.items()}
    frozen = {prefix + name for prefix, state in routers.items() for name, tensor in state.items() if not tensor.is_floating_point()}
    read_weights(folder, {name: tensor for name, tensor in targets.items() if name not in frozen})
    for prefix, router in engine.routers.items():
        found = read_tensors(folder, [prefix + name for name in routers[prefix]])
        router.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in found.items()})  # checks the frozen part's hash


def _state_file(folder: Path, rank: int) -> Path:
    return folder / f"state-{rank:05d}.pt"


def _read_state(path: Path) -> dict[str, Any]:
    try:
        # Our own file, verified by its checksum before: it holds optimizer objects of DeepSpeed.
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: the checkpoint was written by another number of ranks",
            remedy="resume with the number of ranks of the run that wrote it, or load weights alone with --finetune",
        ) from error
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", remedy="load an older checkpoint of the run") from error
    return state


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
