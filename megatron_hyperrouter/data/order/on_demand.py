"""An order of samples that is computed when it is needed: for corpora whose index would take minutes and
gigabytes.

Neighbouring documents of the file form blocks.  In each epoch the blocks are permuted and divided into
regions of several blocks, so a region has documents from all over the corpus.  The documents of a region
are permuted again and joined.  The stream of all regions and epochs is divided into samples of
``seq_length`` tokens and one more, the last label.  Samples that begin in the same region are permuted
among themselves.  So each token is read exactly once per epoch, region after region, and neighbours change
from epoch to epoch.  The order is a function of the seed and the sample's number; it does not depend on
the number of samples.

In memory are the start of each block (8 bytes per block) and a few regions (16 bytes per document).
``tokens`` below are positions in an epoch's stream unless stated otherwise; all arithmetic uses integers
of any size.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from megatron_hyperrouter.data.order import index
from megatron_hyperrouter.data.order.index import Implementation, Integers
from megatron_hyperrouter.data.order.shuffled import Span
from megatron_hyperrouter.data.store.token_files import IndexedDataset, Int32s, Int64s
from megatron_hyperrouter.errors import DataError

Made = TypeVar("Made")

BLOCK = 2048  # documents; this number and the next one are part of the order's definition
REGION = 64  # blocks
_BLOCKS, _DOCUMENTS, _SAMPLES = range(3)  # what a key is for
_EPOCHS_KEPT, _REGIONS_KEPT = 2, 3  # a sample may end in the next region, and threads read ahead


@dataclass(frozen=True)
class Epoch:
    """``blocks`` [B]: blocks in the order of this epoch; ``region_starts`` [regions + 1]: token at which each
    region begins.
    """

    blocks: Int64s
    region_starts: Int64s


@dataclass(frozen=True)
class Region:
    """``documents`` [D] in reading order, int32 where that can name them; ``starts`` [D + 1]: token of the
    region at which each begins, and where the region ends.
    """

    documents: Integers
    starts: Int64s


@dataclass(frozen=True)
class SampleWindow:
    """The samples that begin in a region: numbers ``first`` to before ``until``, in the permutation of
    ``key``; ``begin``: the token of the stream of all epochs at which the region begins.
    """

    first: int
    until: int
    key: int
    epoch: int
    number: int
    begin: int
    region: Region


class OnDemandOrder:
    """Samples of ``documents`` of one file: ``num_samples``, or those of one epoch (None).  Threads may
    share it.

    ValueError if one epoch has no whole sample.  DataError if documents do not follow one another in
    ``.bin``, when such a block is read: no other part of the index is read before it is needed.
    """

    def __init__(
        self,
        store: IndexedDataset,
        documents: range,
        *,
        seq_length: int,
        num_samples: int | None,
        seed: int,
        block: int = BLOCK,
        region: int = REGION,
        impl: Implementation | None = None,
    ) -> None:
        self._store, self._documents, self._seq_length, self._seed = store, documents, seq_length, seed
        self._block, self._region = block, region
        self._impl = impl or index.IMPLEMENTATIONS[index.implementation()]
        firsts = range(documents.start, documents.stop, block)
        self._block_starts = store.first_tokens([*firsts, documents.stop])
        self.tokens_per_epoch = int(self._block_starts[-1] - self._block_starts[0])
        whole = (self.tokens_per_epoch - 1) // seq_length  # the samples that need no token of a second epoch
        if whole < 1:
            raise ValueError(
                f"one sample needs {seq_length + 1} tokens (--seq-length {seq_length}, plus 1 for the last "
                f"label), but the data have only {self.tokens_per_epoch} tokens"
            )
        self._end = whole if num_samples is None else None
        self._num_samples = whole if num_samples is None else num_samples
        self._epochs: _Recent[Epoch] = _Recent(_EPOCHS_KEPT)
        self._regions: _Recent[Region] = _Recent(_REGIONS_KEPT)
        # that of the last sample; most of the next samples have the same one
        self._window: SampleWindow | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return self._num_samples

    def span(self, i: int) -> Span:
        """The position of sample ``i``.  IndexError outside 0 .. len - 1."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} is out of range: there are {len(self)} samples")
        window = self._window  # read once: another thread may replace it
        if window is None or not window.first <= i < window.until:
            window = self._window = self._make_window(i)
        sample = window.first + self._impl.permuted(i - window.first, window.until - window.first, window.key)
        return self._span(
            window.region,
            window.epoch,
            window.number,
            sample * self._seq_length - window.begin,
            self._seq_length + 1,
        )

    def between(self, token: int, length: int) -> Span:
        """The positions of ``length`` tokens of the stream, from ``token`` on, counted over all epochs."""
        epoch, number = self.region_at(token)
        begin, _ = self.borders(epoch, number)
        return self._span(self.region(epoch, number), epoch, number, token - begin, length)

    def region_at(self, token: int) -> tuple[int, int]:
        """Epoch and region that contain ``token`` of the stream of all epochs."""
        epoch, inside = divmod(token, self.tokens_per_epoch)
        return epoch, int(np.searchsorted(self.epoch(epoch).region_starts, inside, "right")) - 1

    def borders(self, epoch: int, number: int) -> tuple[int, int]:
        """The first token of a region and the token after its last, in the stream of all epochs."""
        begin, end = self.epoch(epoch).region_starts[number : number + 2].tolist()
        return epoch * self.tokens_per_epoch + begin, epoch * self.tokens_per_epoch + end

    def among(self, position: int, count: int, epoch: int, number: int) -> int:
        """Which of the ``count`` samples that begin in a region is read at ``position`` among them."""
        return self._impl.permuted(position, count, self._key(_SAMPLES, epoch, number))

    def first_among(self, read: int, count: int, epoch: int, number: int) -> Int64s:
        """The first ``read`` of them."""
        return self._impl.permutation(count, self._key(_SAMPLES, epoch, number))[:read]

    def _span(self, region: Region, epoch: int, number: int, begin: int, length: int) -> Span:
        """``length`` tokens from token ``begin`` of a region on."""
        first = int(region.starts.searchsorted(begin, "right")) - 1
        last_token = begin + length - 1
        head = begin - int(region.starts[first])
        if last_token < region.starts[-1]:
            last = int(region.starts.searchsorted(last_token, "right")) - 1
            return Span(region.documents, first, head, last, last_token - int(region.starts[last]) + 1)
        pieces = [region.documents[first:]]
        # the sample continues in the next region, or in the one after that
        while last_token >= region.starts[-1]:
            last_token -= int(region.starts[-1])
            epoch, number = (
                (epoch, number + 1) if number + 2 < len(self.epoch(epoch).region_starts) else (epoch + 1, 0)
            )
            region = self.region(epoch, number)
            pieces.append(region.documents)
        last = int(region.starts.searchsorted(last_token, "right")) - 1
        pieces[-1] = region.documents[: last + 1]
        documents = np.concatenate(pieces)
        return Span(documents, 0, head, len(documents) - 1, last_token - int(region.starts[last]) + 1)

    def epoch(self, number: int) -> Epoch:
        """The order of blocks in an epoch."""
        return self._epochs.get(number, lambda: self._make_epoch(number))

    def region(self, epoch: int, number: int) -> Region:
        """The order of documents in a region of an epoch."""
        return self._regions.get((epoch, number), lambda: self._make_region(epoch, number))

    def _make_window(self, i: int) -> SampleWindow:
        """The window of sample ``i``."""
        epoch, number = self.region_at(i * self._seq_length)
        begin, end = self.borders(epoch, number)
        first, until = -(-begin // self._seq_length), -(-end // self._seq_length)
        if self._end is not None:
            until = min(until, self._end)
        return SampleWindow(
            first, until, self._key(_SAMPLES, epoch, number), epoch, number, begin, self.region(epoch, number)
        )

    def _make_epoch(self, number: int) -> Epoch:
        blocks = self._impl.permutation(len(self._block_starts) - 1, self._key(_BLOCKS, number))
        ends = np.cumsum(np.diff(self._block_starts)[blocks])
        last_of_region = (
            np.minimum(np.arange(self._region, len(ends) + self._region, self._region), len(ends)) - 1
        )
        return Epoch(blocks, np.concatenate([[0], ends[last_of_region]]).astype(np.int64))

    def _make_region(self, epoch: int, number: int) -> Region:
        blocks = self.epoch(epoch).blocks[number * self._region : (number + 1) * self._region].tolist()
        firsts = [self._documents.start + block * self._block for block in blocks]
        ranges = [range(first, min(first + self._block, self._documents.stop)) for first in firsts]
        found = self._store.read_sequences(ranges)
        sizes = np.concatenate([self._checked(*each) for each in zip(blocks, ranges, found, strict=True)])
        kind = np.int32 if self._documents.stop < 2**31 else np.int64
        documents = np.concatenate([np.arange(each.start, each.stop, dtype=kind) for each in ranges])
        order = self._impl.permutation(len(documents), self._key(_DOCUMENTS, epoch, number))
        starts = np.zeros(len(documents) + 1, np.int64)
        np.cumsum(sizes[order], out=starts[1:])
        return Region(documents[order], starts)

    def _checked(self, block: int, documents: range, found: tuple[Int32s, Int64s]) -> Int32s:
        """Tokens of each document of a block; the documents must fill the block's part of ``.bin``, one after
        another.
        """
        sizes, pointers = found
        begin, end = self._block_starts[block : block + 2].tolist()
        bounds = begin + np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        if (
            sizes.min() < 0
            or bounds[-1] != end
            or not np.array_equal(pointers, bounds[:-1] * self._store.dtype.itemsize)
        ):
            place = f"{self._store.idx_path}: sequences {documents.start} to {documents.stop - 1}"
            raise DataError(
                f"{place} must be contiguous in the .bin file and have {end - begin:,} tokens in total",
                remedy="use --data-index materialised, or preprocess the text again",
            )
        return sizes

    def _key(self, purpose: int, epoch: int, region: int = 0) -> int:
        return index.key_of(self._seed, purpose, epoch, region)


class _Recent(Generic[Made]):
    """The most recent values; if several threads need the same one, it is computed only once."""

    def __init__(self, kept: int) -> None:
        self._kept, self._lock = kept, threading.Lock()
        self._made: OrderedDict[Hashable, Made] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """The value for that key."""
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
                if len(self._made) > self._kept:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
            return self._made[key]
