"""What a run has not read yet of one file, and the order in which it continues: for runs whose settings
change.

The documents of a file form one endless stream of tokens, epoch after epoch (:mod:`on_demand`).  It
depends only on the seed, not on the division into samples.  Samples are shuffled, so a run that stops has
read the whole stream up to some token, except for some pieces.  The next samples, of any length, are taken
from those pieces in order and then from the rest of the stream.  So every token is read exactly once per
epoch, no matter how often the length, the mix or the batch size changes.  A run that began with an index
of megatron-core's kind first reads the pieces of that index that it has not read.

Where two pieces meet, the last label of the first is the first token of the second, as where two documents
meet.

Legend: ``P`` pieces.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from megatron_hyperrouter.data.order import index
from megatron_hyperrouter.data.order.index import Implementation, Integers
from megatron_hyperrouter.data.order.on_demand import OnDemandOrder
from megatron_hyperrouter.data.order.shuffled import SampleOrder, Span

_LEFT = 3  # what a key is for, besides those of on_demand


class TokenRange(NamedTuple):
    """Tokens ``begin`` to before ``end`` of the stream, or of the built index where ``built``."""

    begin: int
    end: int
    built: bool


@dataclass(frozen=True)
class Remaining:
    """``pieces``, and after them the stream from token ``following`` on; ``changes``: how often the settings
    changed before.
    """

    pieces: tuple[TokenRange, ...] = ()
    following: int = 0
    changes: int = 0


class BuiltStream:
    """The tokens of a built index in the order of its documents."""

    def __init__(self, order: SampleOrder, sizes: Integers) -> None:
        self.order = order
        self._starts = np.zeros(len(order.document_index) + 1, np.int64)
        np.cumsum(sizes[order.document_index], out=self._starts[1:])

    def between(self, token: int, length: int) -> Span:
        """The positions of these tokens."""
        first, last = (
            int(np.searchsorted(self._starts, place, "right")) - 1 for place in (token, token + length - 1)
        )
        return Span(
            self.order.document_index,
            first,
            token - int(self._starts[first]),
            last,
            token + length - int(self._starts[last]),
        )

    def after(self, read: int, seq_length: int) -> Remaining:
        """What is left when the first ``read`` samples, of ``seq_length`` tokens, have been read."""
        samples = self.order.shuffle_index
        unread = np.ones(len(samples), bool)
        unread[samples[:read]] = False
        pieces = [(begin * seq_length, end * seq_length) for begin, end in _runs(unread)]
        pieces.append((len(samples) * seq_length, int(self._starts[-1])))  # too few for a sample
        return Remaining(tuple(TokenRange(*piece, built=True) for piece in _joined(pieces)), 0, 1)


class RemainingOrder:
    """Samples of ``seq_length`` tokens and one more, their last label, from the tokens that are unread."""

    def __init__(
        self,
        unread: Remaining,
        stream: OnDemandOrder,
        built: BuiltStream | None,
        *,
        seq_length: int,
        seed: int,
        limit: int | None = None,
        impl: Implementation | None = None,
    ) -> None:
        """``limit``: total number of samples, if the order has such a number."""
        self._limit = limit
        self.unread, self._stream, self._built, self._seq_length = unread, stream, built, seq_length
        # 0, then each piece's
        self._ends = list(accumulate((piece.end - piece.begin for piece in unread.pieces), initial=0))
        self._left = self._ends[-1]  # tokens of all pieces
        self._from_left = -(-self._left // seq_length)  # samples that begin in them
        self._key = index.key_of(seed, _LEFT, unread.changes)
        self._impl = impl or index.IMPLEMENTATIONS[index.implementation()]

    def spans(self, i: int) -> Iterator[tuple[Span, int]]:
        """The positions of the parts of sample ``i``, and the number of tokens in each part."""
        begin = self._number(i) * self._seq_length
        end = begin + self._seq_length + 1
        for piece in self._located(begin, end):
            stream = self._built if piece.built else self._stream
            assert stream is not None
            yield stream.between(piece.begin, piece.end - piece.begin), piece.end - piece.begin

    def after(self, read: int) -> Remaining:
        """What is left when the first ``read`` samples have been read."""
        epoch = region = 0
        first, until = 0, self._from_left
        if read >= until:
            epoch, region, first, until = self._window(read)
        # nothing of this window has been read, and where samples are limited, it may hold none
        if read == first:
            return Remaining(
                () if first else self.unread.pieces, self._following(first), self.unread.changes + 1
            )
        if read < self._from_left:
            numbers = self._impl.permutation(until, self._key)[:read]
        else:
            numbers = self._stream.first_among(read - first, until - first, epoch, region) + first
        unread = np.ones(until - first, bool)
        unread[numbers - first] = False
        ranges = [
            ((first + begin) * self._seq_length, (first + end) * self._seq_length)
            for begin, end in _runs(unread)
        ]
        pieces = (piece for begin, end in ranges for piece in self._located(begin, end))
        return Remaining(tuple(pieces), self._following(until), self.unread.changes + 1)

    def _following(self, sample: int) -> int:
        """The token of the stream at which sample number ``sample`` begins, or the first if that is in a
        piece.
        """
        return self.unread.following + max(sample * self._seq_length - self._left, 0)

    def _number(self, i: int) -> int:
        """The number of the sample, in the order of the stream, that is read at position ``i``."""
        if i < 0:
            raise IndexError(f"sample {i}")
        if i < self._from_left:
            return self._impl.permuted(i, self._from_left, self._key)
        epoch, region, first, until = self._window(i)
        return first + self._stream.among(i - first, until - first, epoch, region)

    def _window(self, i: int) -> tuple[int, int, int, int]:
        """Epoch and region in which sample ``i`` begins, and the samples from and to which begin there."""
        # maps a token of the stream to its position among the unread tokens
        shift = self._left - self.unread.following
        epoch, region = self._stream.region_at(i * self._seq_length - shift)
        begin, end = (border + shift for border in self._stream.borders(epoch, region))
        until = -(-end // self._seq_length)
        return (
            epoch,
            region,
            max(-(-begin // self._seq_length), self._from_left),
            min(until, self._limit or until),
        )

    def _located(self, begin: int, end: int) -> Iterator[TokenRange]:
        """The positions of the unread tokens from ``begin`` to before ``end``."""
        number = bisect_right(self._ends, begin) - 1
        while begin < end and number < len(self.unread.pieces):
            piece, start = self.unread.pieces[number], self._ends[number]
            until = min(end, self._ends[number + 1])
            if until > begin:
                yield TokenRange(piece.begin + begin - start, piece.begin + until - start, piece.built)
            begin, number = max(begin, until), number + 1
        if begin < end:
            shift = self.unread.following - self._left
            yield TokenRange(begin + shift, end + shift, built=False)


def _runs(unread: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> list[tuple[int, int]]:
    """The start and end of each run of neighbouring True values."""
    borders = np.flatnonzero(np.diff(np.concatenate([[False], unread, [False]]).astype(np.int8)))
    return [(int(begin), int(end)) for begin, end in borders.reshape(-1, 2)]


def _joined(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges without empty ones, with neighbouring ones joined."""
    joined: list[tuple[int, int]] = []
    for begin, end in pieces:
        if joined and joined[-1][1] == begin:
            begin = joined.pop()[0]
        if end > begin:
            joined.append((begin, end))
    return joined
