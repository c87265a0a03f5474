"""``--pack-documents``: samples of whole documents; no document is split that fits into a sample.

Best-fit-decreasing packing, as in "Fewer Truncations Improve Language Modeling" (2404.10830, section 3):
the longest document first, each into the sample with the smallest remaining space that is large enough, or
else into a new sample.  A document longer than a sample is split into pieces that each fill a sample; the
remainder is packed like a document.  The remaining space of a sample is filled with the id that ends a
document, which ``--eod-mask-loss`` excludes from the loss.  Each token is in one sample, so an epoch reads
it exactly once.  The documents of a sample depend on the seed and do not change; since attention keeps
documents apart, only the order of samples changes from epoch to epoch.

Legend: ``M`` pieces of documents, ``P`` samples of an epoch, ``S`` sequence length; a sample is S + 1
tokens.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_hyperrouter.data.order import index
from megatron_hyperrouter.data.order.index import Implementation, Integers
from megatron_hyperrouter.data.store.token_files import IndexedDataset
from megatron_hyperrouter.errors import DataError

_SHUFFLED, _SAMPLES = 4, 5  # what a key is for, besides those of on_demand and unread


@dataclass(frozen=True)
class Packing:
    """Which pieces each sample holds: piece m is ``documents`` [M] from token ``begins`` [M] on; sample p has
    the pieces from ``starts`` [P + 1] number p to before number p + 1.
    """

    documents: Integers
    begins: Integers
    starts: Integers


def pack(
    sizes: npt.NDArray[np.int32],
    documents: range,
    *,
    length: int,
    seed: int,
    impl: Implementation | None = None,
) -> Packing:
    """Pack ``documents``, which have ``sizes`` tokens, into samples of ``length`` tokens; linear in the
    number of documents, except for sorting.
    """
    full, rest = np.divmod(sizes[documents.start : documents.stop], np.int32(length))
    long = np.flatnonzero(full)
    copies = full[long].astype(np.int64)
    cut = np.repeat(long, copies)
    number = np.arange(len(cut)) - np.repeat(np.cumsum(copies) - copies, copies)  # of a piece in its document
    # Equal documents are often neighbours; shuffled, those of one sample come from anywhere.
    shuffled = (impl or index.IMPLEMENTATIONS[index.implementation()]).permutation(
        len(rest), index.key_of(seed, _SHUFFLED)
    )
    items = shuffled[rest[shuffled] > 0]
    # sorted by counting where it can be
    room = (length - rest[items]).astype(np.uint16 if length < 2**16 else np.int32)
    items = items[np.argsort(room, kind="stable")]
    samples = best_fit(np.bincount(rest[items], minlength=length), length)
    items = items[np.argsort(samples, kind="stable")]
    ends = np.concatenate([np.arange(len(cut) + 1), len(cut) + np.cumsum(np.bincount(samples))])
    kind = np.int32 if documents.stop < 2**31 else np.int64
    return Packing(
        (np.concatenate([cut, items]) + documents.start).astype(kind),
        np.concatenate([number * length, full[items] * np.int64(length)]).astype(np.int32),
        ends.astype(np.int64),
    )


def best_fit(counts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """The sample of each item, longest first, given how many have each size; samples contain ``length``.

    Items of one size are placed together: samples with the same remaining space are filled one after another.
    """
    samples = np.empty(int(counts.sum()), np.int64)
    rooms: list[int] = []  # remaining spaces that some sample has, ascending
    having: dict[int, list[npt.NDArray[np.int64]]] = {}  # remaining space -> samples
    opened = placed = 0

    def keep(numbers: npt.NDArray[np.int64], room: int) -> None:
        if len(numbers) and room:
            if room not in having:
                insort(rooms, room)
            having.setdefault(room, []).append(numbers)

    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left:
            at = bisect_left(rooms, size)
            room = rooms[at] if at < len(rooms) else length
            each = room // size
            wanted = -(-left // each)
            if at < len(rooms):
                numbers = having[room].pop()
                if not having[room]:
                    del having[room], rooms[at]
                keep(numbers[wanted:], room)
                numbers = numbers[:wanted]
            else:
                numbers = np.arange(opened, opened + wanted)
                opened += wanted
            taken = min(left, len(numbers) * each)
            samples[placed : placed + taken] = np.repeat(numbers, each)[:taken]
            placed, left = placed + taken, left - taken
            whole, over = divmod(taken, each)
            keep(numbers[:whole], room - each * size)
            keep(numbers[whole:], room - over * size)
    return samples


class PackedDataset:
    """The samples of one file, epoch after epoch, each epoch in another order.  Threads may share it."""

    def __init__(
        self,
        store: IndexedDataset,
        packing: Packing,
        *,
        seq_length: int,
        vocab_size: int,
        eod: int,
        seed: int,
        num_samples: int | None = None,
        impl: Implementation | None = None,
    ) -> None:
        """``eod``: the id that ends a document; ``num_samples``: None for one epoch."""
        self.store, self.packing, self.vocab_size, self.eod = store, packing, vocab_size, eod
        self._length, self._seed = seq_length + 1, seed
        self._epoch = len(packing.starts) - 1
        self._size = self._epoch if num_samples is None else num_samples
        self._impl = impl or index.IMPLEMENTATIONS[index.implementation()]

    def __len__(self) -> int:
        """Number of samples."""
        return self._size

    def __getitem__(self, i: int) -> npt.NDArray[np.int64]:
        """Sample ``i``: int64 [S + 1].  IndexError outside 0 .. len - 1; DataError for a token id outside the
        vocabulary, and for a document that does not end with ``eod``.
        """
        if not 0 <= i < self._size:
            raise IndexError(f"sample {i} is out of range: there are {self._size} samples")
        epoch, place = divmod(i, self._epoch)
        row = self._impl.permuted(place, self._epoch, index.key_of(self._seed, _SAMPLES, epoch))
        pieces = slice(*self.packing.starts[row : row + 2].tolist())
        documents, begins = self.packing.documents[pieces], self.packing.begins[pieces].astype(np.int64)
        store = self.store
        store.check_length()
        left = store.sizes[documents] - begins
        sizes = np.minimum(left, self._length).astype(np.int32)
        ends = np.cumsum(sizes)
        sample = np.full(self._length, self.eod, np.int64)
        pointers = store.pointers[documents] + begins * store.dtype.itemsize
        last, filled = len(sizes) - 1, sample[: ends[-1]]
        bad = self._impl.gather(
            store.tokens,
            pointers,
            sizes,
            np.arange(last + 1),
            0,
            0,
            last,
            int(sizes[-1]),
            self.vocab_size,
            filled,
        )
        if bad >= 0:
            piece = int(np.searchsorted(ends, bad, "right"))
            offset = int(begins[piece] + bad - ends[piece] + sizes[piece])
            raise store.foreign_token(int(documents[piece]), offset, int(sample[bad]), self.vocab_size)
        unended = (left <= self._length) & (sample[ends - 1] != self.eod)
        if unended.any():
            raise DataError(
                f"{store.bin_path}: document {store.document_of(int(documents[unended][0]))} does not end "
                f"with id {self.eod},"
                " which --pack-documents uses to separate documents",
                remedy="preprocess the text with --append-eod, or leave out --pack-documents",
            )
        return sample
