"""``--mock-data``: made-up token files in memory, for runs without data.

The corpus depends only on the vocabulary, so every rank and every later run has the same one.  From one
token to the next, the id grows by 1, 2 or 3 with equal probability, so the best possible loss is ln 3 nats
per token.
"""

from __future__ import annotations

import numpy as np

from megatron_hyperrouter.data.store.mapped import InMemory
from megatron_hyperrouter.data.store.token_files import IndexedDataset, index_header, smallest_dtype

PREFIX = "--mock-data"  # used instead of a prefix: no file has this name
_TOKENS, _DOCUMENTS = 1 << 22, 1 << 13
_STEPS = 3  # by how much the id may grow


class MadeUpTokens(IndexedDataset):
    """A corpus for a vocabulary of ``vocab_size`` ids, where ``eod`` (by default the last id) ends a
    document.
    """

    def __init__(self, vocab_size: int, eod: int | None) -> None:
        self._key = {"made up": vocab_size, "eod": vocab_size - 1 if eod is None else eod}
        super().__init__(PREFIX, files=_files(vocab_size, self._key["eod"]))

    def cache_key(self) -> dict[str, int]:
        """What the content depends on."""
        return self._key


def _files(vocab_size: int, eod: int) -> tuple[InMemory, InMemory]:
    """The bytes of ``.idx`` and ``.bin``."""
    draw = np.random.RandomState(0)  # whose numbers are the same in every version of NumPy
    dtype, ids = smallest_dtype(vocab_size), max(vocab_size - 1, 1)
    walk = np.cumsum(draw.randint(1, _STEPS + 1, _TOKENS)) % ids
    walk[walk >= eod] += 1  # every id except that one
    marks = np.sort(draw.choice(np.arange(1, _TOKENS), _DOCUMENTS - 1, replace=False))
    ends = np.append(marks, _TOKENS)
    walk[ends - 1] = eod
    sizes = np.diff(ends, prepend=0)
    index = [
        index_header(dtype, _DOCUMENTS, _DOCUMENTS),
        sizes.astype("<i4").tobytes(),
        ((ends - sizes) * dtype.itemsize).astype("<i8").tobytes(),
        np.arange(_DOCUMENTS + 1, dtype="<i8").tobytes(),
    ]
    return InMemory(f"{PREFIX}.idx", b"".join(index)), InMemory(f"{PREFIX}.bin", walk.astype(dtype).tobytes())
