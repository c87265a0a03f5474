"""Weights on disk: safetensors files with global parameter names; each tensor is written once, by one
rank.

Names do not depend on the layout, so any layout reads what another layout wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_hyperrouter.checkpoint.boxes import Cut, Slices, boxes, whole_shape
from megatron_hyperrouter.errors import CheckpointError

_PATTERN = "weights-*.safetensors"


class Reader:
    """The files of one checkpoint, each opened once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: dict[str, Any] = {}

    def part(self, file: str, key: str, slices: Slices) -> Tensor:
        """A rectangle of the tensor ``key`` in ``file``; nothing else of it is read."""
        opened = self._open(file)
        try:
            found: Tensor = opened.get_slice(key)[slices] if slices else opened.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.folder / file, error) from error
        return found

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            try:
                self._opened[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise _unreadable(self.folder / file, error) from error
        return self._opened[file]


def write_weights(folder: Path, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors that ``rank`` owns; a rank that owns none writes nothing."""
    if tensors:
        write_tensors(folder / f"weights-{rank:05d}.safetensors", _apart(tensors))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file, with the permissions that the umask gives any new file."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(mode)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, of which no two share memory, because safetensors refuses that; others are not
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
    folder: Path,
    targets: Mapping[str, Tensor],
    cuts: Mapping[str, Cut] | None = None,
    *,
    reader: Reader | None = None,
) -> None:
    """Copy each target's tensor from ``folder`` into it; reports all missing tensors and wrong shapes at
    once.

    ``cuts``: the tensors of which this rank has only a part, and how they are split.  The file contains
    the whole tensor; only the part is read.
    """
    cuts, reader, files = cuts or {}, reader or Reader(folder), weight_files(folder)
    _refuse_misfits(folder, targets, cuts, files)
    with torch.no_grad():
        for name, target in targets.items():
            shape = tuple(target.shape)
            for placed in boxes(shape, 0, target.numel(), cuts.get(name)):
                part = reader.part(files[name], name, placed.box.slices)
                if part.numel() == target.numel():
                    target.copy_(part.reshape(shape))
                else:
                    target.view(-1)[placed.begin : placed.end].copy_(part.reshape(-1))


def _refuse_misfits(
    folder: Path, targets: Mapping[str, Tensor], cuts: Mapping[str, Cut], files: Mapping[str, str]
) -> None:
    problems = [f"{name} is not in the checkpoint" for name in targets if name not in files]
    for name, file in _opened(folder, files, targets):
        stored = file.get_slice(name)
        found, needed = (
            list(stored.get_shape()),
            list(whole_shape(tuple(targets[name].shape), cuts.get(name))),
        )
        if found != needed:
            problems.append(f"{name}: shape {found} in the checkpoint, but {needed} in this model")
        elif ("F" in stored.get_dtype()) != targets[name].is_floating_point():
            problems.append(
                f"{name}: dtype {stored.get_dtype()} in the checkpoint, but {targets[name].dtype} in "
                "this model"
            )
    if problems:
        shown = "\n".join(f"  {line}" for line in problems[:8]) + (
            f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        )
        raise CheckpointError(
            f"the model in {folder} has different tensors or shapes from the model of this run:\n{shown}",
            remedy=(
                "use the settings of the run that wrote the checkpoint, from config.yaml in its run folder"
            ),
        )


def read_tensors(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of ``names`` that ``folder`` holds; each file is opened once."""
    return {name: file.get_tensor(name) for name, file in _opened(folder, weight_files(folder), names)}


def weight_names(folder: Path) -> set[str]:
    """Global names of all tensors in ``folder``."""
    return set(weight_files(folder))


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Global name -> shape of all tensors in ``folder``."""
    files = weight_files(folder)
    return {name: tuple(file.get_slice(name).get_shape()) for name, file in _opened(folder, files, files)}


def _opened(folder: Path, files: Mapping[str, str], names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """(name, open file that has it) for those of ``names`` that are in ``files``, file by file."""
    by_file: dict[str, list[str]] = {}
    for name in names:
        if name in files:
            by_file.setdefault(files[name], []).append(name)
    for path, inside in by_file.items():
        with safe_open(folder / path, framework="pt") as file:
            for name in inside:
                yield name, file


def weight_files(folder: Path) -> dict[str, str]:
    """Global name -> name of the file in ``folder`` that has the tensor."""
    files: dict[str, str] = {}
    for path in sorted(folder.glob(_PATTERN)):
        try:
            with safe_open(path, framework="pt") as file:
                files.update(dict.fromkeys(file.keys(), path.name))
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
    if not files:
        raise CheckpointError(
            f"{folder} has no {_PATTERN} files", remedy="use a run folder or one of its checkpoints"
        )
    return files


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {error}", remedy="load an older checkpoint of this run")
