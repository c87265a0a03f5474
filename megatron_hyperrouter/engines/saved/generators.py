"""The random generators of a rank, which only dropout uses.

They belong to a position in a layout, so they cannot move: on another layout they get new seeds.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_hyperrouter.errors import CheckpointError, reason_of
from megatron_hyperrouter.model.parallel import dropout_states, seed_dropout, set_dropout_states

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig


def file_of(rank: int) -> str:
    """Name of a rank's file."""
    return f"random-{rank:05d}.json"


def later_text(config: RunConfig, world_size: int) -> Callable[[], str]:
    """The current state of all generators, and the layout that they belong to; the text itself is made
    later.
    """
    own = torch.get_rng_state()
    tracker = {name: state.clone() for name, state in dropout_states().items()}
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def text() -> str:
        states: dict[str, Any] = {
            "torch": _text_of(own),
            "tracker": {name: _text_of(state) for name, state in tracker.items()},
        }
        if cuda is not None:
            states["cuda"] = _text_of(cuda)
        return json.dumps({"layout": _layout(config, world_size), "states": states})

    return text


def restore(folder: Path, rank: int, config: RunConfig, *, world_size: int, step: int) -> bool:
    """Restore the rank's generators; if the layout has changed, give them new seeds and return False."""
    path = folder / file_of(rank)
    try:
        saved: dict[str, Any] = (
            json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"layout": ""}
        )
        if saved["layout"] == _layout(config, world_size):
            _set(saved["states"])
            return True
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {reason_of(error)}", remedy="load an older checkpoint of this run"
        ) from error
    seed_dropout(config, seed=_seed_at(config.train.seed, step))
    return False


def _layout(config: RunConfig, world_size: int) -> dict[str, Any]:
    return {"engine": config.engine.engine, "world_size": world_size, **asdict(config.parallel)}


def _seed_at(seed: int, step: int) -> int:
    """A seed that is far from those of other steps, because the seeds of ranks differ by small numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:4], "big") >> 2


def _set(states: dict[str, Any]) -> None:
    torch.set_rng_state(_tensor_of(states["torch"]))
    if tracker := states["tracker"]:  # missing if the run seeded no tracker
        set_dropout_states({name: _tensor_of(text) for name, text in tracker.items()})
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(_tensor_of(states["cuda"]))


def set_format_1(states: dict[str, Any]) -> None:
    """Continue from the generators that a checkpoint of format 1 has."""
    torch.set_rng_state(states["torch"])
    if tracker := states.get("tracker"):
        set_dropout_states(tracker)
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _text_of(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _tensor_of(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
