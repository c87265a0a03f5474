"""Tensors of a folder, read by name and written into shards, with one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_hyperrouter.checkpoint.tensor_files import TensorEntry, header_bytes, read_header
from megatron_hyperrouter.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Tensors(Protocol):
    """Tensors by name."""

    def __contains__(self, name: str) -> bool: ...

    def meta(self, name: str) -> Tensor:
        """A tensor of that shape and dtype, without numbers."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor."""
        ...


class TensorReader:
    """The tensors of several safetensors files, by name."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files: dict[str, tuple[Path, TensorEntry]] = {}
        for path in paths:
            try:
                entries = read_header(path)
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"{path} cannot be read: {error}", remedy="restore the file from a copy"
                ) from error
            self._files |= {entry.name: (path, entry) for entry in entries}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._files)

    def meta(self, name: str) -> Tensor:
        """A tensor of that shape and dtype, without numbers."""
        path, entry = self._files[name]
        return torch.empty(entry.shape, dtype=_dtype(path, entry), device="meta")

    def read(self, name: str) -> Tensor:
        """The tensor."""
        path, entry = self._files[name]
        tensor = torch.empty(entry.shape, dtype=_dtype(path, entry))
        try:
            with path.open("rb") as file:
                file.seek(entry.begin)
                got = file.readinto(as_bytes(tensor))
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}", remedy="restore the file from a copy"
            ) from error
        if got != tensor.nbytes:
            raise CheckpointError(f"{path} ends inside {name}", remedy="restore the file from a copy")
        return tensor

    def digest(self) -> str:
        """One SHA-256 over (name, dtype, shape, bytes) of all tensors."""
        found = hashlib.sha256()
        for name in self.names():
            _, entry = self._files[name]
            found.update(f"{name} {entry.dtype} {list(entry.shape)} ".encode())
            found.update(as_bytes(self.read(name)))
        return found.hexdigest()


def _dtype(path: Path, entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: the tensor {entry.name} has the data type {entry.dtype}, which is not supported",
            remedy="save the model again in bfloat16 or float32",
        )
    return DTYPES[entry.dtype]


class TensorToWrite(NamedTuple):
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def shards(planned: Sequence[TensorToWrite], max_bytes: int) -> list[list[TensorToWrite]]:
    """Divide the tensors into files of at most ``max_bytes``; a larger tensor gets a separate file."""
    found: list[list[TensorToWrite]] = [[]]
    size = 0
    for each in planned:
        if found[-1] and size + each.nbytes > max_bytes:
            found.append([])
            size = 0
        found[-1].append(each)
        size += each.nbytes
    return found


def write_shard(path: Path, planned: Sequence[TensorToWrite], tensors: Iterator[Tensor]) -> dict[str, str]:
    """Write the next ``tensors``, as planned, into one file; returns name -> SHA-256 of the bytes."""
    digests: dict[str, str] = {}
    with path.open("wb") as file:
        file.write(header_bytes((p.name, NAMES[p.dtype], p.shape, p.nbytes) for p in planned))
        for each, tensor in zip(planned, tensors, strict=False):
            if tensor.dtype != each.dtype or tuple(tensor.shape) != each.shape:
                raise ValueError(
                    f"{each.name}: planned {each.dtype} {list(each.shape)}, got {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
            bytes_ = as_bytes(tensor)
            file.write(bytes_)
            digests[each.name] = hashlib.sha256(bytes_).hexdigest()
    return digests


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, without a copy if it is contiguous."""
    if not tensor.numel():
        return memoryview(bytearray())
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
