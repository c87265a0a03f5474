"""Optimizer state on disk: boxes (rectangles of tensors) under global names, one safetensors file per
rank, and one index of all.

    optimizer.json                 name -> shape, dtype, optimizer steps, digests of the whole, boxes
    optimizer-RRRRR.safetensors    keys NAME#BOX#FIELD, float32

If a parameter is float32 itself, it is its own master weight, which is not written again.  Nothing here
communicates with another rank, and nothing is a pickle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_hyperrouter.checkpoint.boxes import Box, Shape, gap
from megatron_hyperrouter.checkpoint.digest import MASK, digest
from megatron_hyperrouter.checkpoint.weights import Reader, write_tensors, write_weights
from megatron_hyperrouter.errors import CheckpointError, reason_of

INDEX = "optimizer.json"
WEIGHT, MASTER = "weight", "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
_PART = "index-{rank}.json"  # of one rank, until they are joined
_FILE = re.compile(r"optimizer-\d+\.safetensors")
_MOST = 1 << 53  # no tensor is longer, and no run takes more steps


class State(NamedTuple):
    """A box of one parameter's optimizer state, as one rank writes it."""

    name: str
    shape: Shape  # of the whole tensor
    box: Box
    steps: int  # that the optimizer took for this parameter
    fields: dict[str, Tensor]  # MASTER and MOMENTS -> the box's numbers, in one row


class Stored(NamedTuple):
    """Where a box is kept."""

    file: str
    key: str  # without the field
    box: Box


@dataclass
class IndexEntry:
    """What the index says about one tensor."""

    shape: Shape
    dtype: str = ""  # of the weight, as torch names it
    trained: bool = False  # the optimizer has state of it
    steps: int | None = None
    digests: dict[str, int] = field(default_factory=dict)  # WEIGHT, MASTER, MOMENTS -> of the whole tensor
    boxes: list[Stored] = field(default_factory=list)

    @property
    def full(self) -> str:
        """The field that has the weight with the highest precision."""
        return MASTER if MASTER in self.digests else WEIGHT

    def add(self, name: str, value: int) -> None:
        """Add a part to a field's digest."""
        self.digests[name] = (self.digests.get(name, 0) + value) & MASK

    def join(self, other: IndexEntry) -> None:
        """Add what another rank reports; ValueError if the two contradict each other."""
        if self.shape != other.shape:
            raise ValueError(
                f"its shape is {list(self.shape)} on one rank and {list(other.shape)} on another"
            )
        if None not in (self.steps, other.steps) and self.steps != other.steps:
            raise ValueError(f"it has {self.steps} optimizer steps on one rank and {other.steps} on another")
        if self.dtype and other.dtype:
            raise ValueError("two ranks write its weight")
        self.dtype, self.trained = self.dtype or other.dtype, self.trained or other.trained
        self.steps = other.steps if self.steps is None else self.steps
        for name, value in other.digests.items():
            self.add(name, value)
        self.boxes += other.boxes

    def problem(self) -> str:
        """Why this is not one whole tensor; empty if it is."""
        if not self.dtype:
            return "no rank has written its weight"
        if not self.trained:
            return ""
        needed = {WEIGHT, *MOMENTS} | (set() if self.dtype == "float32" else {MASTER})
        if missing := needed - self.digests.keys():
            return f"no rank has written its {', '.join(sorted(missing))}"
        return gap(self.shape, [stored.box for stored in self.boxes])


@dataclass
class Staged:
    """Copies in CPU memory of what one of ``ranks`` writes; :meth:`write` needs neither another rank nor a
    GPU.
    """

    rank: int
    ranks: int
    weights: dict[str, Tensor]
    trained: set[str]  # of ``weights``: those for which the optimizer has state
    states: list[State]
    texts: dict[str, Callable[[], str]]  # other files of this rank, made when they are written

    def write(self, folder: Path) -> list[Path]:
        """Write this rank's files, and return those that stay; NotFiniteError names the tensor that is
        lost.
        """
        index: dict[str, IndexEntry] = {}
        for name, tensor in self.weights.items():
            shape = tuple(tensor.shape)
            entry = index[name] = IndexEntry(
                shape, str(tensor.dtype).removeprefix("torch."), name in self.trained
            )
            entry.add(WEIGHT, _digest(name, WEIGHT, tensor, Box((0,) * len(shape), shape), shape))
        write_weights(folder, self.rank, self.weights)
        file = f"optimizer-{self.rank:05d}.safetensors"
        if tensors := dict(self._state_tensors(index, file)):
            write_tensors(folder / file, tensors)
        for name, text in self.texts.items():
            (folder / name).write_text(text(), encoding="utf-8")
        _write_index(folder / _PART.format(rank=self.rank), index)
        names = [f"weights-{self.rank:05d}.safetensors", file, *self.texts]
        return [folder / name for name in names if (folder / name).exists()]

    def _state_tensors(self, index: dict[str, IndexEntry], file: str) -> Iterator[tuple[str, Tensor]]:
        for state in self.states:
            entry = index.setdefault(state.name, IndexEntry(state.shape, trained=True))
            key = f"{state.name}#{len(entry.boxes)}"
            entry.steps = state.steps
            entry.boxes.append(Stored(file, key, state.box))
            for name, row in state.fields.items():
                entry.add(name, _digest(state.name, name, row, state.box, state.shape))
                yield f"{key}#{name}", row.view(state.box.size)

    def join(self, folder: Path) -> None:
        """Make one index of those of all ranks (the main rank, after all have written); refuses a gap."""
        joined: dict[str, IndexEntry] = {}
        parts = [folder / _PART.format(rank=rank) for rank in range(self.ranks)]
        for rank, path in enumerate(parts):
            if not path.is_file():
                raise CheckpointError(f"rank {rank} wrote no files to {folder}", remedy=_REPORT)
            for name, entry in _read_index(path).items():
                if name not in joined:
                    joined[name] = entry
                    continue
                try:
                    joined[name].join(entry)
                except ValueError as error:
                    raise CheckpointError(f"{name}: {error}", remedy=_REPORT) from error
        for name, entry in joined.items():
            if problem := entry.problem():
                raise CheckpointError(f"{name}: {problem}", remedy=_REPORT)
        _write_index(folder / INDEX, joined)
        for path in parts:
            path.unlink()


_REPORT = (
    "continue from the last checkpoint, and report this bug: the ranks disagree about which rank writes "
    "which part"
)


def read_index(folder: Path) -> dict[str, IndexEntry] | None:
    """Global name -> entry; None if there is no index, as in a checkpoint of format 1."""
    path = folder / INDEX
    try:
        index = _read_index(path)
        for name, entry in index.items():
            if problem := entry.problem():
                raise ValueError(f"{name}: {problem}")
        return index
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {reason_of(error)}", remedy="load an older checkpoint of this run"
        ) from error


def read_box(reader: Reader, entry: IndexEntry, name: str, box: Box, row: Tensor) -> None:
    """Fill ``row`` with the numbers of ``box`` of one field of a tensor, from the files that contain them."""
    target = row.view(box.size)
    for stored in entry.boxes:
        if common := box.common(stored.box):
            part = reader.part(stored.file, f"{stored.key}#{name}", common.within(stored.box))
            if tuple(part.shape) != common.size or part.dtype != row.dtype:
                raise CheckpointError(
                    f"{reader.folder / stored.file}: the shape or type of {stored.key}#{name} "
                    f"differs from {INDEX}",
                    remedy="load an older checkpoint of this run",
                )
            target[common.within(box)].copy_(part) if box.size else target.copy_(part)


def _digest(name: str, what: str, values: Tensor, box: Box, shape: Shape) -> int:
    if values.is_floating_point() and not torch.isfinite(values).all():
        raise NotFiniteError(
            f"{name}: its {what} contains NaN or infinity; nothing was saved",
            remedy=(
                "continue from the last checkpoint with a lower --lr, or skip the bad steps with --skip-steps"
            ),
        )
    return digest(values, box, shape)


class NotFiniteError(CheckpointError):
    """A weight or a moment is not finite, so saving again would not help."""


def _write_index(path: Path, index: Mapping[str, IndexEntry]) -> None:
    plain: dict[str, Any] = {}
    for name, entry in sorted(index.items()):
        plain[name] = {
            "shape": entry.shape,
            "dtype": entry.dtype,
            "trained": entry.trained,
            "steps": entry.steps,
            "digests": {key: f"{value:016x}" for key, value in entry.digests.items()},
            "boxes": [
                [stored.file, stored.key, stored.box.offset, stored.box.size] for stored in entry.boxes
            ],
        }
    path.write_text(json.dumps(plain), encoding="utf-8")


def _read_index(path: Path) -> dict[str, IndexEntry]:
    return {name: _entry(raw) for name, raw in json.loads(path.read_text(encoding="utf-8")).items()}


def _entry(raw: dict[str, Any]) -> IndexEntry:
    """ValueError, KeyError or TypeError if it is not as :func:`_write_index` writes it."""
    shape = _numbers(raw["shape"])
    return IndexEntry(
        shape=shape,
        dtype=_checked(raw["dtype"], raw["dtype"] == "" or _is_dtype(raw["dtype"])),
        trained=_checked(raw["trained"], isinstance(raw["trained"], bool)),
        steps=None if raw["steps"] is None else _numbers([raw["steps"]])[0],
        digests={key: _checked(int(value, 16), len(value) <= 18) for key, value in raw["digests"].items()},
        boxes=[
            Stored(
                _checked(file, bool(_FILE.fullmatch(file))),
                _checked(key, isinstance(key, str) and key.isprintable()),
                Box(_numbers(offset, len(shape)), _numbers(size, len(shape))),
            )
            for file, key, offset, size in raw["boxes"]
        ],
    )


def _numbers(raw: Any, count: int | None = None) -> Shape:
    """Whole numbers from 0 on; ``count`` of them."""
    fit = isinstance(raw, list) and all(type(number) is int and 0 <= number < _MOST for number in raw)
    return tuple(_checked(raw, fit and count in (None, len(raw))))


def _is_dtype(name: Any) -> bool:
    return isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype)


def _checked(value: Any, fits: bool) -> Any:
    if not fits:
        raise ValueError(f"unexpected value {value!r:.80}")
    return value
