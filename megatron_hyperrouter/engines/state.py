"""What a rank saves and loads: weights by global name, whole and once each; optimizer and random state by
rank.

The hosts' own files cannot be read on another expert-parallel size (DeepSpeed) or by another engine; these
can.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_hyperrouter.checkpoint.weights import read_tensors, read_weights, write_weights
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.model.names import WORD_EMBEDDINGS, is_expert, matrices, router_parameter
from megatron_hyperrouter.model.parallel import dropout_states, set_dropout_states
from megatron_hyperrouter.model.sharding import gathered, shard_of, tensor_parallel_place
from megatron_hyperrouter.routers.base import Router


class Holding(NamedTuple):
    """The part of the model that a rank holds, and of which weights it has the first copy."""

    named: Iterable[tuple[str, nn.Parameter]]  # global names
    routers: dict[str, Router]  # prefix of the global names -> router
    first_dense: bool  # first among the data-parallel ranks
    first_expert: bool  # first among the ranks that hold the same experts
    first_stage: bool  # of the pipeline: a later stage's copy of the embedding is not written again


def save_weights(folder: Path, rank: int, holding: Holding) -> None:
    """Write what this rank has the first copy of (collective: tensor-parallel pieces are joined one after
    another).

    The ranks of a tensor-parallel group take turns in keeping what was joined, so that all of them write, and
    none holds it all.
    """
    owned: dict[str, Tensor] = {}
    # experts and dense weights: their tensor-parallel groups differ, and may have other turns
    turns = {
        True: 0,
        False: 0,
    }
    for name, parameter in matrices(holding.named):
        if router_parameter(name) is not None or (name == WORD_EMBEDDINGS and not holding.first_stage):
            continue
        expert = is_expert(name)
        if not (holding.first_expert if expert else holding.first_dense):
            continue  # the same for all ranks of a tensor-parallel group
        shard = shard_of(name)
        whole = parameter.detach() if shard is None else gathered(name, parameter, shard)
        size, place = tensor_parallel_place(name)
        if turns[expert] % size == place:
            owned[name] = whole.cpu()
        turns[expert] += 1
    if holding.first_dense and tensor_parallel_place("")[1] == 0:
        for prefix, router in holding.routers.items():
            owned.update({prefix + name: tensor for name, tensor in router.state_dict().items()})
    write_weights(folder, rank, owned)


def load_weights(folder: Path, holding: Holding) -> None:
    """Read this rank's part from what any layout of any engine wrote."""
    named = {name: parameter for name, parameter in matrices(holding.named) if router_parameter(name) is None}
    shards = {name: shard for name in named if (shard := shard_of(name)) is not None}
    targets: dict[str, Tensor] = dict(named)
    for prefix, router in holding.routers.items():  # frozen hashes are compared by the router itself
        state = router.state_dict()
        targets.update(
            {prefix + name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
        )
    read_weights(folder, targets, shards)
    for prefix, router in holding.routers.items():
        found = read_tensors(folder, [prefix + name for name in router.state_dict()])
        router.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in found.items()})


def save_state(folder: Path, rank: int, optimizer: Any) -> None:
    """Write this rank's optimizer state and its random generators."""
    torch.save({"optimizer": optimizer, "random": _random_state()}, _state_file(folder, rank))


def load_state(folder: Path, rank: int) -> Any:
    """Restore the random generators; returns the optimizer state."""
    state = _read_state(folder, rank)
    _set_random_state(state["random"])
    return state["optimizer"]


def load_states(folder: Path, rank: int) -> list[Any]:
    """The optimizer states of all ranks, mapped rather than read; a rank that was there before gets its
    random generators back.
    """
    states = [_read_state(folder, number, mmap=True) for number in range(_saved_ranks(folder))]
    if rank < len(states):
        _set_random_state(states[rank]["random"])
    return [state["optimizer"] for state in states]


def as_many_ranks(folder: Path) -> bool:
    """Whether as many ranks have saved their state there as there are now."""
    return _saved_ranks(folder) == (dist.get_world_size() if dist.is_initialized() else 1)


def _saved_ranks(folder: Path) -> int:
    return len(list(folder.glob(_state_file(folder, 0).name.replace("00000", "*"))))


def _read_state(folder: Path, rank: int, *, mmap: bool = False) -> Any:
    path = _state_file(folder, rank)
    try:
        # Our own file, its checksum verified before: it holds optimizer objects of the host.
        return torch.load(path, map_location="cpu", weights_only=False, mmap=mmap)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: the checkpoint was written by another number of ranks",
            remedy="resume with the number of ranks of the run that wrote it, or load weights alone with "
            "--finetune",
        ) from error
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", remedy="load an older checkpoint of the run"
        ) from error


def _state_file(folder: Path, rank: int) -> Path:
    return folder / f"state-{rank:05d}.pt"


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    state["tracker"] = dropout_states()
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if states := state.get("tracker"):  # none in a run that seeded no tracker, or in an older checkpoint
        set_dropout_states(states)
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
