"""Where a rank's values are in the whole tensor: flat ranges of a tensor-parallel part, as rectangles
(boxes).

Every host's optimizer keeps a contiguous range of the row-major numbers of a parameter.  In an
n-dimensional part, such a range is at most ``2 n - 1`` rectangles, and a rectangle of the part is a
rectangle of the whole tensor.  So every rank can write what it has and find what it needs without
communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple, Protocol

Shape = tuple[int, ...]
Slices = tuple[slice, ...]


class Cut(Protocol):
    """How tensor parallelism splits a whole tensor: ``parts`` matrices are stacked along ``dim``, and each
    is split separately.
    """

    @property
    def dim(self) -> int:
        """Along which dimension."""
        ...

    @property
    def rank(self) -> int:
        """Which piece this rank holds."""
        ...

    @property
    def size(self) -> int:
        """Into how many pieces."""
        ...

    @property
    def parts(self) -> int:
        """How many matrices are stacked."""
        ...

    def whole_shape(self, shape: Sequence[int]) -> Shape:
        """Shape of the whole, given that of the piece."""
        ...


class Box(NamedTuple):
    """A rectangle of a whole tensor."""

    offset: Shape
    size: Shape

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return prod(self.size)

    def common(self, other: Box) -> Box | None:
        """The intersection of both boxes; None if it is empty."""
        low = tuple(map(max, self.offset, other.offset))
        high = tuple(map(min, self.end, other.end))
        if any(begin >= end for begin, end in zip(low, high, strict=True)):
            return None
        return Box(low, tuple(end - begin for begin, end in zip(low, high, strict=True)))

    def within(self, other: Box) -> Slices:
        """The position of this box in a tensor that contains ``other``."""
        pairs = zip(self.offset, self.size, other.offset, strict=True)
        return tuple(slice(begin - base, begin - base + length) for begin, length, base in pairs)

    @property
    def slices(self) -> Slices:
        """Its slices of the whole tensor."""
        return tuple(slice(begin, end) for begin, end in zip(self.offset, self.end, strict=True))

    @property
    def end(self) -> Shape:
        """The first position after it, along each dimension."""
        return tuple(begin + length for begin, length in zip(self.offset, self.size, strict=True))


class FilledBox(NamedTuple):
    """A box, and the flat range of the piece that fills it."""

    box: Box
    begin: int
    end: int


def whole_shape(shape: Shape, cut: Cut | None) -> Shape:
    """Shape of the whole tensor, if a rank has a part of ``shape``."""
    return shape if cut is None else cut.whole_shape(shape)


def boxes(shape: Shape, begin: int, end: int, cut: Cut | None) -> list[FilledBox]:
    """Numbers ``begin`` to before ``end`` of a piece of ``shape``, as boxes of the whole tensor."""
    parts = cut.parts if cut is not None and cut.dim == 0 else 1
    own = (shape[0] // parts, *shape[1:]) if shape else ()
    found = []
    for part in range(parts):
        base = part * prod(own)
        first, last = max(begin - base, 0), min(end - base, prod(own))
        for offset, size, at in _rectangles(own, first, last) if first < last else ():
            box = Box(offset if cut is None else _moved(offset, shape, cut, part), size)
            found.append(FilledBox(box, base + at, base + at + box.numel))
    return found


def _moved(offset: Shape, shape: Shape, cut: Cut, part: int) -> Shape:
    """The position in the whole tensor of a position in one part of the piece."""
    if cut.dim == 0:
        step = shape[0] // cut.parts
        return offset[0] + (part * cut.size + cut.rank) * step, *offset[1:]
    if cut.parts != 1:
        raise ValueError(
            f"a tensor that is cut along dimension {cut.dim} must have one part, not {cut.parts}"
        )
    moved = list(offset)
    moved[cut.dim] += cut.rank * shape[cut.dim]
    return tuple(moved)


def _rectangles(shape: Shape, begin: int, end: int) -> Iterator[tuple[Shape, Shape, int]]:
    """(offset, size, flat position) of rectangles that cover row-major numbers ``begin`` to before
    ``end``.
    """
    if not shape:
        yield (), (), begin
        return
    row = prod(shape[1:])
    first, last = begin // row, (end - 1) // row
    if first == last and end - begin < row:  # inside one row
        yield from _inside(shape, first, begin, end)
        return
    if begin % row:
        yield from _inside(shape, first, begin, (first + 1) * row)
        first += 1
    rest = end // row
    if rest > first:
        yield (first, *[0] * (len(shape) - 1)), (rest - first, *shape[1:]), first * row
    if end % row:
        yield from _inside(shape, rest, rest * row, end)


def _inside(shape: Shape, row: int, begin: int, end: int) -> Iterator[tuple[Shape, Shape, int]]:
    base = row * prod(shape[1:])
    for offset, size, at in _rectangles(shape[1:], begin - base, end - base):
        yield (row, *offset), (1, *size), base + at


def gap(shape: Shape, covering: Sequence[Box]) -> str:
    """Why the boxes do not cover a tensor of ``shape`` exactly once; empty if they do."""
    whole = Box((0,) * len(shape), shape)
    if any(box.common(whole) != box for box in covering):
        return "a part lies outside the tensor"
    active: list[Box] = []
    for box in sorted(covering, key=lambda each: each.offset):
        active = [other for other in active if not shape or other.end[0] > box.offset[0]]
        if any(box.common(other) for other in active):
            return "a part is present twice"
        active.append(box)
    missing = prod(shape) - sum(box.numel for box in covering)
    return f"{missing} of {prod(shape)} values are missing" if missing else ""
