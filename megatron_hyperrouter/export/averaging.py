"""The average of checkpoints of one run as a new checkpoint, with one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_hyperrouter.checkpoint.streams import TensorReader, TensorToWrite, write_shard
from megatron_hyperrouter.errors import CheckpointError


@dataclass(frozen=True)
class Term:
    """A checkpoint and its weight in the average."""

    step: int
    weight: float
    reader: TensorReader


def shares(count: int, *, weights: Sequence[float] | None = None, ema: float | None = None) -> list[float]:
    """Weights that sum to 1 for ``count`` checkpoints, oldest first: equal, as given, or falling by ``ema`` a
    checkpoint.
    """
    raw = list(weights) if weights is not None else [1.0] * count
    if ema is not None:
        raw = [ema ** (count - 1 - number) for number in range(count)]
    total = sum(raw)
    return [weight / total for weight in raw]


def check_alike(terms: Sequence[Term]) -> None:
    """CheckpointError unless all checkpoints have the same tensors, and the same frozen parts."""
    first = terms[0]
    for term in terms[1:]:
        if term.reader.names() != first.reader.names():
            raise _misfit(first, term, "have different tensors")
        for name in first.reader.names():
            mine, theirs = first.reader.meta(name), term.reader.meta(name)
            if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
                raise _misfit(first, term, f"differ in the shape of {name}")
            fixed = not mine.is_floating_point() and not _counts(name)
            if fixed and not torch.equal(first.reader.read(name), term.reader.read(name)):
                raise _misfit(first, term, f"differ in {name}, which cannot be averaged")


def average(name: str, terms: Sequence[Term]) -> Tensor:
    """The average of one tensor, computed in float64 and converted to the dtype of the checkpoints; integers
    are taken from the last checkpoint.
    """
    last = terms[-1].reader.read(name)
    if not last.is_floating_point():
        return last
    total = torch.zeros(last.shape, dtype=torch.float64)
    for term in terms:
        total += term.weight * term.reader.read(name).double()
    return total.to(last.dtype)


def write_average(folder: Path, terms: Sequence[Term]) -> dict[str, str]:
    """Write ``weights-00000.safetensors``; returns the digest of each tensor."""
    check_alike(terms)
    reader = terms[-1].reader
    names = reader.names()
    planned = [TensorToWrite(name, reader.meta(name).dtype, tuple(reader.meta(name).shape)) for name in names]
    return write_shard(
        folder / "weights-00000.safetensors", planned, (average(name, terms) for name in names)
    )


def _counts(name: str) -> bool:
    """A number that grows while a run trains."""
    return name.endswith(".frozen_at")


def _misfit(first: Term, other: Term, what: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoints of steps {first.step} and {other.step} {what}",
        remedy="average only checkpoints of the same run",
    )
