"""Tensors that are drawn from a seed, never trained and never saved: a checkpoint contains their seed and
hash.

They are neither parameters nor buffers, so no engine can cast, reduce, decay or shard them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.ops import keyed
from megatron_hyperrouter.routers.base import Router


@dataclass(frozen=True)
class Recipe(ABC):
    """Everything that decides the bytes of some frozen tensors; equal recipes give equal tensors."""

    seed: int
    name: str  # prefix of the names of their streams

    @abstractmethod
    def draw(self, device: torch.device) -> tuple[tuple[Tensor, ...], str]:
        """The tensors, float32, on ``device``, and their :func:`keyed.digest`.  A recipe for a part of the
        tensors gives the hash of the whole ones.
        """

    def normal(
        self, part: str, shape: tuple[int, ...], std: float, device: torch.device, *, start: int = 0
    ) -> Tensor:
        """N(0, std^2) numbers of the stream ``name.part``, from number ``start``."""
        name = f"{self.name}.{part}"
        return keyed.normal(shape, seed=self.seed, name=name, device=device, start=start).mul_(std)


class FrozenTensors:
    """The tensors of one recipe on one device: an immutable value that all its users share without
    copying.
    """

    def __init__(self, recipe: Recipe, tensors: tuple[Tensor, ...], digest: str) -> None:
        self.recipe = recipe
        self.tensors = tensors
        self.digest = digest
        self.device = tensors[0].device

    def to(self, device: torch.device) -> FrozenTensors:
        """The same tensors on ``device``; itself if they are already there, or if ``device`` has no
        numbers (meta).
        """
        if device == self.device or device.type == "meta":
            return self
        return _shared(self.recipe, device, lambda: self._copied(device))

    def _copied(self, device: torch.device) -> FrozenTensors:
        with torch.inference_mode(False), torch.no_grad():
            return FrozenTensors(
                self.recipe, tuple(tensor.to(device) for tensor in self.tensors), self.digest
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTensors:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickle contains only the recipe.  The machine that reads it may have no such device; the first
        # pass copies the tensors to where they are needed.
        return frozen, (self.recipe, torch.device("cpu"))


# A memo of a pure function: with one hypernetwork for all layers, the layers share its memory; an entry is
# removed with its last user.
_ALIVE: WeakValueDictionary[tuple[Recipe, torch.device], FrozenTensors] = WeakValueDictionary()


def frozen(recipe: Recipe, device: torch.device) -> FrozenTensors:
    """The tensors of ``recipe``, drawn on ``device`` (on the CPU for meta), or the existing ones of
    another router.
    """
    device = torch.device("cpu") if device.type == "meta" else device
    return _shared(recipe, device, lambda: _drawn(recipe, device))


def _shared(recipe: Recipe, device: torch.device, make: Callable[[], FrozenTensors]) -> FrozenTensors:
    value = _ALIVE.get((recipe, device))
    if value is None:
        _ALIVE[recipe, device] = value = make()
    return value


def _drawn(recipe: Recipe, device: torch.device) -> FrozenTensors:
    with torch.inference_mode(False), torch.no_grad():
        return FrozenTensors(recipe, *recipe.draw(device))


class FrozenRouter(Router):
    """A router with a frozen part.  Its ``state_dict`` contains that part's seed and hash, and loading
    compares them.
    """

    frozen_seed: Tensor  # int64 [1]
    frozen_hash: Tensor  # uint8 [32], SHA-256

    def freeze(self, recipe: Recipe) -> None:
        """Draw the frozen part on the device on which new tensors are created; the constructor calls it
        once, before ``reset``.
        """
        self.register_buffer("frozen_seed", torch.empty(1, dtype=torch.int64))
        self.register_buffer("frozen_hash", torch.empty(32, dtype=torch.uint8))
        self.frozen = frozen(recipe, self.frozen_seed.device)

    def reset_buffers(self) -> None:
        """See :meth:`Router.reset_buffers`."""
        super().reset_buffers()
        self.frozen_seed.fill_(self.frozen.recipe.seed)
        digest = list(bytes.fromhex(self.frozen.digest))
        self.frozen_hash.copy_(torch.tensor(digest, dtype=torch.uint8, device="cpu"))

    def frozen_tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        """The frozen part on ``device``."""
        # the module moved without ``to``, as unpickling with a map_location does
        if self.frozen.device != device:
            self.frozen = self.frozen.to(device)
        if device.type == "meta":
            return tuple(tensor.to(device) for tensor in self.frozen.tensors)
        return self.frozen.tensors

    def frozen_digest(self, device: torch.device) -> str:
        """The hash of the frozen bytes that this router uses, computed anew (collective where ranks divide
        them).
        """
        return keyed.digest(self.frozen_tensors(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenRouter:
        # moves parameters and the two buffers; a dtype cannot touch the frozen part
        super()._apply(fn, recurse)
        self.frozen = self.frozen.to(self.frozen_hash.device)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}frozen_hash")
        if saved is not None:
            # If all tensors were converted to a floating-point type, it still has the same whole numbers.
            saved_hash = bytes(saved.flatten().to(torch.uint8).tolist()).hex()
            if saved_hash != self.frozen.digest:
                self._refuse(saved_hash, state_dict.get(f"{prefix}frozen_seed"), prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _refuse(self, saved_hash: str, saved_seed: Tensor | None, prefix: str) -> None:
        seed, drawn = self.frozen.recipe.seed, self.frozen.digest
        other = "an unknown seed" if saved_seed is None else f"seed {int(saved_seed)}"
        raise CheckpointError(
            (
                f"{prefix}frozen_hash: the checkpoint was trained with frozen router weights drawn from "
                f"{other} in layer {self.layer_number} (hash {saved_hash[:16]}...), but this run draws them "
                f"from seed {seed} (hash {drawn[:16]}...)"
            ),
            remedy=(
                "use the seed, sizes and router options in the config.yaml of the run that wrote the "
                "checkpoint"
            )
            if saved_seed is None or int(saved_seed) == seed
            else f"set --router.seed {int(saved_seed)}",
        )
