"""Weights on disk: safetensors files, global parameter names, each tensor written once by the rank that owns
it.

Names do not depend on the layout, so any layout reads what another one wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_hyperrouter.errors import CheckpointError

_PATTERN = "weights-*.safetensors"


class Piece(Protocol):
    """The part of a whole tensor that this rank holds."""

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the whole, given that of the part."""
        ...

    def cut(self, whole: Tensor) -> Tensor:
        """The part."""
        ...


def write_weights(folder: Path, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors that ``rank`` owns; a rank that owns none writes nothing."""
    if tensors:
        save_file(_apart(tensors), folder / f"weights-{rank:05d}.safetensors")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, none in the memory of another, which safetensors refuses; what lies there by itself is not
    copied.
    """
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        if own.untyped_storage().nbytes() != own.nbytes or own.data_ptr() in taken:
            own = own.clone()
        taken.add(own.data_ptr())
        found[name] = own
    return found


def read_weights(
    folder: Path, targets: Mapping[str, Tensor], pieces: Mapping[str, Piece] | None = None
) -> None:
    """Copy each target's tensor from ``folder`` into it, one after another; reports every missing or
    misshapen one at once.

    ``pieces``: of which tensors this rank holds only a part, and which; the file has the whole.
    """
    pieces, files = pieces or {}, _files_by_name(folder)
    problems = [f"{name}: not in the checkpoint" for name in targets if name not in files]
    for name, file in _opened(files, targets):
        found, shape = file.get_slice(name).get_shape(), tuple(targets[name].shape)
        needed = pieces[name].whole_shape(shape) if name in pieces else shape
        if tuple(found) != needed:
            problems.append(f"{name}: {list(found)} in the checkpoint, {list(needed)} in this model")
    if problems:
        shown = "\n".join(f"  {line}" for line in problems[:8]) + (
            f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        )
        raise CheckpointError(
            f"{folder} holds a model of other sizes or another router:\n{shown}",
            remedy="use the settings of the run that wrote it: its config.yaml stands beside checkpoints/",
        )
    with torch.no_grad():
        for name, file in _opened(files, targets):
            whole = file.get_tensor(name)
            targets[name].copy_(pieces[name].cut(whole) if name in pieces else whole)


def read_tensors(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of ``names`` that ``folder`` holds; each file is opened once."""
    return {name: file.get_tensor(name) for name, file in _opened(_files_by_name(folder), names)}


def weight_names(folder: Path) -> set[str]:
    """Global names of all tensors in ``folder``."""
    return set(_files_by_name(folder))


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Global name -> shape of all tensors in ``folder``."""
    files = _files_by_name(folder)
    return {name: tuple(file.get_slice(name).get_shape()) for name, file in _opened(files, files)}


def _opened(files: Mapping[str, Path], names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """(name, open file that has it) for those of ``names`` that are in ``files``, file by file."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        if name in files:
            by_file.setdefault(files[name], []).append(name)
    for path, inside in by_file.items():
        with safe_open(path, framework="pt") as file:
            for name in inside:
                yield name, file


def _files_by_name(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.glob(_PATTERN)):
        try:
            with safe_open(path, framework="pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}", remedy="load an older checkpoint of the run"
            ) from error
    if not files:
        raise CheckpointError(
            f"{folder} holds no {_PATTERN}", remedy="name a run folder or one of its checkpoints"
        )
    return files
