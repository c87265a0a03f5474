"""Weights on disk: safetensors files, global parameter names, each tensor written once by the rank that owns it.

Names do not depend on the layout, so any layout reads what another one wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_hyperrouter.errors import CheckpointError

_PATTERN = "weights-*.safetensors"


def write_weights(folder: Path, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors that ``rank`` owns; a rank that owns none writes nothing."""
    if tensors:
        on_cpu = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, folder / f"weights-{rank:05d}.safetensors")


def read_weights(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Copy each target's tensor from ``folder`` into it; reports every missing or misshapen one at once."""
    found = read_tensors(folder, targets)
    problems = [f"{name}: not in the checkpoint" for name in targets if name not in found]
    for name, tensor in found.items():
        if tensor.shape != targets[name].shape:
            problems.append(f"{name}: {list(tensor.shape)} in the checkpoint, {list(targets[name].shape)} in this model")
    if problems:
        shown = "\n".join(f"  {line}" for line in problems[:8]) + (f"\n  and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(
            f"{folder} holds a model of other sizes or another router:\n{shown}",
            remedy="use the settings of the run that wrote it: its config.yaml stands beside checkpoints/",
        )
    with torch.no_grad():
        for name, tensor in found.items():
            targets[name].copy_(tensor)


def read_tensors(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of ``names`` that ``folder`` holds; each file is opened once."""
    files = _files_by_name(folder)
    by_file: dict[Path, list[str]] = {}
    for name in names:
        if name in files:
            by_file.setdefault(files[name], []).append(name)
    found: dict[str, Tensor] = {}
    for path, inside in by_file.items():
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_tensor(name) for name in inside})
    return found


def weight_names(folder: Path) -> set[str]:
    """Global names of all tensors in ``folder``."""
    return set(_files_by_name(folder))


def _files_by_name(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.glob(_PATTERN)):
        try:
            with safe_open(path, framework="pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}", remedy="load an older checkpoint of the run") from error
    if not files:
        raise CheckpointError(f"{folder} holds no {_PATTERN}", remedy="name a run folder or one of its checkpoints")
    return files
