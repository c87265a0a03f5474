"""Flat ranges as rectangles and digests that add up, against whole tensors that NumPy cuts and counts."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_hyperrouter.checkpoint.boxes import Box, boxes, gap
from megatron_hyperrouter.checkpoint.digest import digest
from megatron_hyperrouter.model.sharding import Shard

MODULUS = 1 << 64


class Case(NamedTuple):
    """A whole tensor, how it is cut, and a flat range of one piece."""

    whole: tuple[int, ...]
    cut: Shard | None
    begin: int
    end: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    piece = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=3)))
    cut = None
    if piece and draw(st.booleans()):
        dim, size = draw(st.integers(0, len(piece) - 1)), draw(st.integers(1, 3))
        parts = draw(st.integers(1, 2)) if dim == 0 else 1
        if parts == 2:
            piece = (2 * piece[0], *piece[1:])
        cut = Shard(dim, draw(st.integers(0, size - 1)), size, parts)
    whole = cut.whole_shape(piece) if cut else piece
    begin = draw(st.integers(0, prod(piece)))
    return Case(whole, cut, begin, draw(st.integers(begin, prod(piece))))


def piece_of(case: Case) -> np.ndarray:
    """The numbers of this piece, in a row; each number of the whole tensor is its own position."""
    places = torch.arange(prod(case.whole)).view(case.whole)
    return (case.cut.cut(places) if case.cut else places).reshape(-1).numpy()


@given(cases())
def test_boxes_have_the_numbers_of_the_range_in_its_order(case: Case) -> None:
    places = np.arange(prod(case.whole)).reshape(case.whole)
    piece = piece_of(case)
    shape = tuple(case.cut.cut(torch.from_numpy(places)).shape) if case.cut else case.whole
    found = boxes(shape, case.begin, case.end, case.cut)
    rows = [places[placed.box.slices].reshape(-1) for placed in found]
    assert np.concatenate([*rows, np.array([], int)]).tolist() == piece[case.begin : case.end].tolist()
    assert [placed.begin for placed in found] == np.cumsum(
        [case.begin, *(len(row) for row in rows)]
    ).tolist()[: len(rows)]
    assert len(found) <= max(2 * len(shape) - 1, 1) * (case.cut.parts if case.cut else 1)


def plain_digest(values: np.ndarray) -> int:
    """The digest by its formula, one element after another."""
    total = 0
    for place, bits in enumerate(values.reshape(-1).view(np.int32).tolist()):
        factor = (place * 0x9E3779B97F4A7C15 % MODULUS) | 1
        total += (bits + 1) * factor
    return total % MODULUS


@given(cases(), st.integers(0, 2**32 - 1))
def test_digests_of_parts_add_up_to_that_of_the_whole(case: Case, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(case.whole).astype(np.float32)
    ranks = range(case.cut.size if case.cut else 1)
    total = 0
    for rank in ranks:
        cut = Shard(case.cut.dim, rank, case.cut.size, case.cut.parts) if case.cut else None
        piece = cut.cut(torch.from_numpy(values)) if cut else torch.from_numpy(values)
        flat, middle = piece.reshape(-1), piece.numel() // 2
        for begin, end in ((0, middle), (middle, piece.numel())):
            for placed in boxes(tuple(piece.shape), begin, end, cut):
                total += digest(flat[placed.begin : placed.end], placed.box, case.whole)
    assert total % MODULUS == plain_digest(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8])
def test_a_digest_leaves_its_tensor_alone_and_sees_one_changed_bit(dtype: torch.dtype) -> None:
    values = (torch.randn(70_000, 2) * 50).to(dtype)  # more than one chunk
    whole = Box((0, 0), (70_000, 2))
    before = values.clone()
    first = digest(values, whole, (70_000, 2))
    assert torch.equal(values, before)
    values.view(torch.uint8).view(-1)[131_075] ^= 1
    assert digest(values, whole, (70_000, 2)) != first


def test_a_digest_sees_an_exchange_and_a_zero_that_moved() -> None:
    values = torch.randn(4, 4)
    values[0, 0] = 0.0
    whole = Box((0, 0), (4, 4))
    exchanged = values.clone().view(-1)
    exchanged[[0, 5]] = exchanged[[5, 0]]
    assert digest(exchanged, whole, (4, 4)) != digest(values, whole, (4, 4))
    assert digest(values[:2], Box((0, 0), (2, 4)), (4, 4)) != digest(values[:2], Box((2, 0), (2, 4)), (4, 4))


class TestGap:
    WHOLE = (Box((0, 0), (2, 4)), Box((2, 0), (1, 3)), Box((2, 3), (1, 1)), Box((3, 0), (1, 4)))

    def test_covered_once(self) -> None:
        assert gap((4, 4), self.WHOLE) == "" and gap((), [Box((), ())]) == ""

    @pytest.mark.parametrize("lost", range(4))
    def test_a_hole(self, lost: int) -> None:
        left = [box for number, box in enumerate(self.WHOLE) if number != lost]
        assert f"{self.WHOLE[lost].numel} of 16 values are missing" in gap((4, 4), left)

    @pytest.mark.parametrize("again", [*WHOLE, Box((1, 1), (2, 1))])
    def test_twice(self, again: Box) -> None:
        assert "twice" in gap((4, 4), [*self.WHOLE, again])

    def test_outside(self) -> None:
        assert "outside" in gap((4, 4), [*self.WHOLE[:3], Box((3, 0), (2, 4))])

    def test_a_scalar_twice(self) -> None:
        assert "twice" in gap((), [Box((), ()), Box((), ())])
