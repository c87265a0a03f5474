"""What a rank saves and loads: weights and optimizer state by global name, each number once, on any
layout.

The hosts' own files cannot be read on another expert-parallel size (DeepSpeed) or by another engine; these
files can.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hyperrouter.checkpoint.boxes import Box, Shape, boxes, whole_shape
from megatron_hyperrouter.checkpoint.digest import MASK, digest, signed
from megatron_hyperrouter.checkpoint.optimizer import (
    MASTER,
    MOMENTS,
    WEIGHT,
    IndexEntry,
    Staged,
    State,
    read_box,
)
from megatron_hyperrouter.checkpoint.weights import (
    Reader,
    read_tensors,
    read_weights,
    weight_files,
    weight_shapes,
)
from megatron_hyperrouter.engines.saved.pieces import Holding, StatePiece, share, weights
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.model.names import CLASSIFIER, is_expert, matrix_names
from megatron_hyperrouter.model.sharding import (
    Shard,
    gathered,
    is_second_copy,
    replica_place,
    shard_of,
    tensor_parallel_place,
)


class _BoxToWrite(NamedTuple):
    """A box of a tensor that this rank writes, and the range of the rank's optimizer state that fills it."""

    shape: Shape  # of the whole tensor
    box: Box
    at: slice
    keys: dict[str, str]  # field -> its name in memory


class _WeightToWrite(NamedTuple):
    """A weight that this tensor-parallel group writes, and how its slices are joined."""

    shard: Shard | None
    writes: bool  # this rank


class Memory:
    """What is kept from save to save: CPU tensors, which only the first save has to allocate, and the
    assignment of tensors to the ranks that write them.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self.due: list[tuple[Tensor, Tensor]] = []  # (copy, what is to be copied), in this order
        self.parts: dict[tuple[str, int, int], list[_BoxToWrite]] = {}
        self.turns: dict[str, _WeightToWrite] = {}

    def copy(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor in CPU memory that is equal to this one after :meth:`fill`."""
        kept = self._kept.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
            self._kept[key] = kept
        self.due.append((kept, tensor))
        return kept

    def start(self) -> None:
        """Begin all copies that are due, one right after the other.

        Other work between two copies would be slow, because a large copy evicts everything else from the
        processor's caches.
        """
        due, self.due = self.due, []
        with torch.no_grad():
            for kept, tensor in due:
                kept.copy_(tensor, non_blocking=True)

    def fill(self) -> None:
        """Make all copies that are due, and wait until they are complete."""
        self.start()
        if torch.cuda.is_available():
            torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------- saving
def stage(
    rank: int, ranks: int, holding: Holding, memory: Memory, texts: dict[str, Callable[[], str]]
) -> Staged:
    """Copy what this rank writes into CPU memory (collective: tensor-parallel pieces of weights are
    joined).
    """
    weights = dict(_owned_weights(holding, memory))
    states = [state for piece in _held(holding) for state in _states(piece, holding, memory)]
    learning = [name for name, each in holding.named if each.requires_grad] if holding.pieces else []
    trained = {matrix for name in learning for matrix in matrix_names(name) or (name,)}
    memory.fill()
    return Staged(rank, ranks, weights, trained, states, texts)


def _owned_weights(holding: Holding, memory: Memory) -> Iterator[tuple[str, Tensor]]:
    """Copies of the whole weights that this rank writes."""
    memory.turns = memory.turns or dict(_turns(holding))
    for name, tensor in weights(holding):
        if (turn := memory.turns.get(name)) is not None:
            whole = tensor if turn.shard is None else gathered(name, tensor, turn.shard)
            if turn.writes:
                yield name, memory.copy(name, whole)
            if turn.shard is not None:
                memory.start()  # so that no more than one joined weight is in memory


def _turns(holding: Holding) -> Iterator[tuple[str, _WeightToWrite]]:
    """The weights that this rank's tensor-parallel group writes: the ranks that could write a weight take
    turns, starting with the rank that has the least to write.
    """
    burden: dict[bool, list[int]] = {}
    for name, tensor in weights(holding):
        if is_second_copy(name):
            continue
        shard, (copies, copy), (size, place) = (
            shard_of(name),
            replica_place(name),
            tensor_parallel_place(name),
        )
        loads = burden.setdefault(is_expert(name), [0] * (copies * size))
        turn = loads.index(min(loads))
        loads[turn] += tensor.nbytes * (1 if shard is None else shard.size)
        if turn // size == copy:  # the same for all ranks of a tensor-parallel group
            yield name, _WeightToWrite(shard, turn % size == place)


def _held(holding: Holding) -> Iterable[StatePiece]:
    return holding.pieces() if holding.pieces else ()


def _pieces(holding: Holding) -> Iterator[StatePiece]:
    for piece in _held(holding):
        yield from piece.by_matrix()


def _states(held: StatePiece, holding: Holding, memory: Memory) -> Iterator[State]:
    steps = held.steps
    for piece in held.by_matrix():
        for part in _parts(piece, holding, memory):
            copies = {
                field: memory.copy(key, piece.fields[field][part.at]) for field, key in part.keys.items()
            }
            yield State(piece.name, part.shape, part.box, steps, copies)


def _parts(piece: StatePiece, holding: Holding, memory: Memory) -> list[_BoxToWrite]:
    """The boxes that this rank writes of a piece; computed once, because training waits for each save."""
    known = memory.parts.get((piece.name, piece.start, piece.end))
    if known is None:
        shard, shape = shard_of(piece.name), tuple(piece.parameter.shape)
        first, last = share(piece.name, piece.end - piece.start, spread=_is_only_copy(piece, holding))
        written = MOMENTS if piece.parameter.dtype == torch.float32 else (MASTER, *MOMENTS)
        known = [
            _BoxToWrite(
                whole_shape(shape, shard),
                placed.box,
                slice(placed.begin - piece.start, placed.end - piece.start),
                {field: f"{piece.name}#{placed.begin}#{field}" for field in written},
            )
            for placed in (
                boxes(shape, piece.start + first, piece.start + last, shard) if first < last else ()
            )
        ]
        memory.parts[piece.name, piece.start, piece.end] = known
    return known


def _is_only_copy(piece: StatePiece, holding: Holding) -> bool:
    """Whether no other data-parallel rank has these numbers; even a whole part can be the only copy."""
    return holding.spread or piece.end - piece.start != piece.parameter.numel()


# --------------------------------------------------------------------------------------------- loading
def load_weights(reader: Reader, holding: Holding) -> None:
    """Read this rank's part, written by any layout of any engine."""
    targets = {name: tensor for name, tensor in weights(holding) if tensor.is_floating_point()}
    cuts = {name: shard for name in targets if (shard := shard_of(name)) is not None}
    read_weights(reader.folder, targets, cuts, reader=reader)
    for prefix, router in holding.routers.items():  # compares frozen hashes, and drops derived values
        whole = {
            name: targets[name] for name in (prefix + own for own in router.state_dict()) if name in targets
        }
        rest = read_tensors(
            reader.folder, [prefix + own for own in router.state_dict() if prefix + own not in whole]
        )
        router.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in {**whole, **rest}.items()}
        )


def without_new_head(holding: Holding, folder: Path) -> Holding:
    """A classification head that the checkpoint does not have, or has for other classes, keeps its initial
    weights.
    """
    if not any(name.startswith(CLASSIFIER) for name, _ in holding.named):
        return holding
    known = weight_shapes(folder)
    kept = [
        (name, each)
        for name, each in holding.named
        if not name.startswith(CLASSIFIER) or known.get(name) == tuple(each.shape)
    ]
    return holding._replace(named=kept)


def load_optimizer(reader: Reader, index: dict[str, IndexEntry], holding: Holding) -> None:
    """Fill this rank's optimizer; the model's weights must already be loaded."""
    files = weight_files(reader.folder)
    counted: dict[int, int] = {}
    for piece in _pieces(holding):
        entry = index.get(piece.name)
        if entry is None or not entry.trained or entry.steps is None:
            raise CheckpointError(
                f"{reader.folder} has no optimizer state for {piece.name}",
                remedy="load only the weights with --finetune",
            )
        if entry.shape != (needed := whole_shape(tuple(piece.parameter.shape), shard_of(piece.name))):
            raise CheckpointError(
                (
                    f"{reader.folder}: the optimizer state of {piece.name} has shape {list(entry.shape)}, "
                    f"but the weight has shape {list(needed)}"
                ),
                remedy="load an older checkpoint of this run",
            )
        if counted.setdefault(piece.counter, entry.steps) != entry.steps:
            raise CheckpointError(
                f"the optimizer state of {piece.name} has {entry.steps} steps, but other parameters have "
                f"{counted[piece.counter]}; on this layout, all parameters must have the same number of "
                "steps",
                remedy="resume on the layout of the run that wrote the checkpoint",
            )
        piece.set_steps(entry.steps)
        _fill(reader, entry, piece, files)


def _fill(reader: Reader, entry: IndexEntry, piece: StatePiece, files: dict[str, str]) -> None:
    """Read the moments and the master weight of a piece. A float32 parameter itself gets the master
    weight, too.
    """
    shape, shard = tuple(piece.parameter.shape), shard_of(piece.name)
    rows = [(moment, piece.fields[moment], piece.start) for moment in MOMENTS]
    exact = piece.parameter.dtype == torch.float32
    if exact and entry.full == MASTER:
        rows.append((MASTER, piece.parameter.detach().view(-1), 0))
    elif not exact:
        rows.append((entry.full, piece.fields[MASTER], piece.start))
    with torch.no_grad():
        for field, row, start in rows:
            for placed in boxes(shape, start, start + len(row), shard):
                part = row[placed.begin - start : placed.end - start]
                if field == WEIGHT:
                    part.copy_(reader.part(files[piece.name], piece.name, placed.box.slices).reshape(-1))
                else:
                    read_box(reader, entry, field, placed.box, part)
        if exact:
            piece.fields[MASTER].copy_(piece.parameter.detach().view(-1)[piece.start : piece.end])


# ------------------------------------------------------------------------------------------- verifying
def verify(reader: Reader, index: dict[str, IndexEntry], holding: Holding, *, weights_only: bool) -> None:
    """Compare digests of the tensors that are now in the model and in the optimizer with the index
    (collective).
    """
    sums = _weight_sums(index, holding, weights_only=weights_only)
    fields = (WEIGHT,) if weights_only else (WEIGHT, MASTER, *MOMENTS)
    for piece in () if weights_only else _pieces(holding):
        begin, end = share(piece.name, piece.end - piece.start, spread=_is_only_copy(piece, holding))
        for field, row in piece.fields.items():
            sums[piece.name, field] += _sum(
                piece.name, piece.parameter.shape, row[begin:end], piece.start + begin
            )
    keys = [
        (name, field)
        for name, entry in sorted(index.items())
        for field in fields
        if entry.trained or field == WEIGHT
    ]
    found = torch.tensor([signed(sums[key]) for key in keys], dtype=torch.int64, device=holding.device)
    dist.all_reduce(found)
    for (name, field), value in zip(keys, found.tolist(), strict=True):
        expected = index[name].digests[index[name].full if field == MASTER else field]
        if value & MASK != expected and (
            value or field != WEIGHT
        ):  # 0: no rank has such a weight, or none could compare it
            raise CheckpointError(
                f"{reader.folder}: {field} of {name} has changed since the checkpoint was saved "
                "(the digests differ)",
                remedy="load an older checkpoint of this run",
            )


def _weight_sums(
    index: dict[str, IndexEntry], holding: Holding, *, weights_only: bool
) -> defaultdict[tuple[str, str], int]:
    sums: defaultdict[tuple[str, str], int] = defaultdict(int)
    for name, tensor in weights(holding):
        entry = index.get(name)
        if entry is None:
            continue
        saved: torch.dtype = getattr(torch, entry.dtype)
        rounded = saved.itemsize > tensor.element_size()
        refined = not weights_only and entry.full == MASTER and tensor.dtype == torch.float32
        if not rounded and not refined:  # else the master weight is compared
            begin, end = share(name, tensor.numel())
            sums[name, WEIGHT] += _sum(name, tensor.shape, tensor.view(-1)[begin:end].to(saved), begin)
    return sums


def _sum(name: str, shape: Sequence[int], row: Tensor, start: int) -> int:
    """Digest of this rank's numbers of a tensor, from ``start`` on."""
    shard, own = shard_of(name), tuple(shape)
    whole = whole_shape(own, shard)
    return sum(
        digest(row[placed.begin - start : placed.end - start], placed.box, whole)
        for placed in boxes(own, start, start + len(row), shard)
    )
