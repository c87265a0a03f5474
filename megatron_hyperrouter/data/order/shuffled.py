"""The order in which one file's documents become samples: a pure function of sizes, sequence length,
number of samples and seed.

Equal to megatron-core 0.16's ``GPTDataset`` for the same seed: documents are shuffled and joined, epoch
after epoch; that stream is divided into samples; the samples are shuffled again.  :mod:`on_demand` is the
other order, for corpora too large for this one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megatron_hyperrouter.data.order import index
from megatron_hyperrouter.data.order.index import Implementation, Integers
from megatron_hyperrouter.errors import DataError

# If less than this share of the last epoch is needed, it is shuffled separately: otherwise samples
# of documents that are read once more than others would be spread over the whole run.
_SEPARATE_BELOW = 0.80


class Span(NamedTuple):
    """From token ``begin`` of ``documents[first]`` to before token ``end`` of ``documents[last]``: one sample
    and its last label.
    """

    documents: Integers
    first: int
    begin: int
    last: int
    end: int


class Order(Protocol):
    """Which tokens each sample holds."""

    def __len__(self) -> int:
        """Number of samples N."""
        ...

    def span(self, i: int) -> Span:
        """The position of sample ``i``.  IndexError outside 0 .. N - 1."""
        ...


@dataclass(frozen=True)
class SampleOrder:
    """``document_index`` [M]: documents in reading order; ``sample_index`` [N + 1, 2]: where each sample
    begins in it; ``shuffle_index`` [N]: the sample that is read at each position.
    """

    document_index: Integers
    sample_index: Integers
    shuffle_index: Integers

    def __len__(self) -> int:
        """Number of samples N."""
        return len(self.shuffle_index)

    def span(self, i: int) -> Span:
        """The position of sample ``i``.  IndexError outside 0 .. N - 1."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} is out of range: there are {len(self)} samples")
        row = int(self.shuffle_index[i])
        (first, begin), (last, end) = self.sample_index[row : row + 2].tolist()
        return Span(self.document_index, first, begin, last, end + 1)


@dataclass(frozen=True)
class OrderPlan:
    """The counts of an order: ``epochs`` whole epochs of ``tokens_per_epoch``; ``apart``: samples before
    those of the last epoch, if that epoch is shuffled separately, else None.
    """

    epochs: int
    tokens_per_epoch: int
    apart: int | None


def plan_order(tokens_per_epoch: int, *, seq_length: int, num_samples: int | None) -> OrderPlan:
    """As many whole epochs as ``num_samples`` need (None: one).  ValueError if one epoch contains no whole
    sample.
    """
    per_epoch = (tokens_per_epoch - 1) // seq_length
    if per_epoch < 1:
        raise ValueError(
            f"one sample needs {seq_length + 1} tokens (--seq-length {seq_length}, plus 1 for the last "
            f"label), but the data have only {tokens_per_epoch} tokens"
        )
    if num_samples is None:
        return OrderPlan(1, tokens_per_epoch, None)
    epochs = max(1, -(-(num_samples * seq_length + 1) // tokens_per_epoch))
    before_last = (
        (epochs - 1) * tokens_per_epoch - 1
    ) // seq_length  # samples that are complete without the last epoch
    apart = epochs > 1 and num_samples - before_last < int(_SEPARATE_BELOW * per_epoch)
    return OrderPlan(epochs, tokens_per_epoch, before_last if apart else None)


def check_room(prefix: str, plan: OrderPlan, documents: int, seq_length: int) -> None:
    """DataError if building the order of ``documents`` documents needs more memory than this machine has:
    a very long run over a small file.
    """
    samples = plan.epochs * plan.tokens_per_epoch // seq_length
    # the document index and the sample index are in memory together
    needed = 4 * plan.epochs * documents + 8 * samples
    present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > present:
        raise DataError(
            f"{prefix}: the run needs {plan.epochs:,} epochs of this file; their index takes "
            f"{needed / 1e9:,.0f} GB of memory to build, but this machine has {present / 1e9:,.0f} GB",
            remedy="use --data-index on-demand, which builds no index, or a smaller --train-iters",
        )


def build_order(
    sizes: npt.NDArray[np.int32],
    documents: range,
    *,
    seq_length: int,
    num_samples: int | None,
    seed: int,
    impl: Implementation | None = None,
) -> SampleOrder:
    """At least ``num_samples`` samples (None: one epoch) of ``documents``, which have ``sizes`` tokens.

    The order has as many whole epochs as needed.  Raises ValueError if one epoch has no whole sample
    (``seq_length + 1`` tokens).
    """
    tokens_per_epoch = int(sizes[documents.start : documents.stop].sum(dtype=np.int64))
    plan = plan_order(tokens_per_epoch, seq_length=seq_length, num_samples=num_samples)
    return SampleOrder(**dict(order_of(plan, sizes, documents, seq_length=seq_length, seed=seed, impl=impl)))


def order_of(
    plan: OrderPlan,
    sizes: npt.NDArray[np.int32],
    documents: range,
    *,
    seq_length: int,
    seed: int,
    impl: Implementation | None = None,
) -> Iterator[tuple[str, Integers]]:
    """The arrays of the order that was planned, by the names of :class:`SampleOrder`; each is released as
    soon as possible.
    """
    random_state = np.random.RandomState(seed)  # draws the order of documents first, then that of samples
    kind = np.int32 if documents.stop < 2**31 else np.int64
    order = index.document_index(
        np.arange(documents.start, documents.stop, dtype=kind),
        plan.epochs,
        random_state,
        plan.apart is not None,
        impl=impl,
    )
    yield "document_index", order
    samples = index.sample_index(sizes, order, seq_length, plan.epochs, plan.tokens_per_epoch, impl=impl)
    del order
    yield "sample_index", samples
    total = len(samples) - 1
    del samples
    yield (
        "shuffle_index",
        index.shuffle_index(total if plan.apart is None else plan.apart, total, random_state, impl=impl),
    )
