"""However often the sequence length changes, the read and the remaining samples together are the stream, with
each token once per epoch.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from data.test_data_on_demand import Sizes
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_hyperrouter.data.order.on_demand import OnDemandOrder
from megatron_hyperrouter.data.order.shuffled import Span, build_order, index
from megatron_hyperrouter.data.stream.remaining import BuiltStream, Remaining, RemainingOrder

every = pytest.mark.parametrize(
    "impl", [pytest.param(impl, id=name) for name, impl in sorted(index.IMPLEMENTATIONS.items())]
)
corpora = st.lists(st.one_of(st.integers(0, 2), st.integers(0, 30)), min_size=1, max_size=25)
# sequence length, samples
changes = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)), min_size=1, max_size=6)


def tokens_of(span: Span, store: Any) -> list[int]:
    """Positions in the file."""
    found: list[int] = []
    for position in range(span.first, span.last + 1):
        document = span.documents[position]
        low = span.begin if position == span.first else 0
        high = span.end if position == span.last else store.sizes[document]
        assert 0 <= low <= high <= store.sizes[document]
        found += range(store.starts[document] + low, store.starts[document] + high)
    return found


def sample_of(order: RemainingOrder, store: Any, i: int, length: int) -> list[int]:
    found: list[int] = []
    for span, part in order.spans(i):
        tokens = tokens_of(span, store)
        assert len(tokens) == part > 0
        found += tokens
    assert len(found) == length + 1
    return found


def left_in(unread: Remaining, stream: OnDemandOrder, built: BuiltStream | None, store: Any) -> Counter[int]:
    """The tokens of all pieces."""
    left: Counter[int] = Counter()
    for begin, end, of_built in unread.pieces:
        assert begin < end
        source = built if of_built else stream
        assert source is not None
        left.update(tokens_of(source.between(begin, end - begin), store))
    return left


def make(sizes: list[int], block: int, region: int, impl: Any) -> tuple[Sizes, OnDemandOrder]:
    store = Sizes(sizes)
    if sum(sizes) < 2:
        assume(condition=False)
    return store, on_demand(store, 1, 1, block, region, impl)


def on_demand(
    store: Any, seq_length: int, num_samples: int, block: int, region: int, impl: Any
) -> OnDemandOrder:
    everyone = range(len(store.sizes))
    return OnDemandOrder(
        store,
        everyone,
        seq_length=seq_length,
        num_samples=num_samples,
        seed=5,
        block=block,
        region=region,
        impl=impl,
    )


@every
@given(sizes=corpora, course=changes, block=st.integers(1, 6), region=st.integers(1, 3))
def test_each_token_is_read_once_an_epoch(
    sizes: list[int], course: list[tuple[int, int]], block: int, region: int, impl: Any
) -> None:
    store, stream = make(sizes, block, region, impl)
    unread, read = Remaining(), Counter[int]()
    for length, samples in course:
        order = RemainingOrder(unread, stream, None, seq_length=length, seed=5, impl=impl)
        for i in range(samples):
            read.update(sample_of(order, store, i, length)[:-1])
        unread = order.after(samples)
    whole = (
        Counter(tokens_of(stream.between(0, unread.following), store)) if unread.following else Counter[int]()
    )
    assert read + left_in(unread, stream, None, store) == whole
    assert unread.changes == len(course)
    # What is left comes first: with it and the rest of the epoch, every token has been read equally often.
    rest = -unread.following % stream.tokens_per_epoch
    total = sum(piece.end - piece.begin for piece in unread.pieces) + rest
    if total:
        last = RemainingOrder(
            Remaining(unread.pieces, unread.following, 9), stream, None, seq_length=total, seed=5, impl=impl
        )
        read.update(sample_of(last, store, 0, total)[:-1])
    assert len({read[token] for token in range(sum(sizes))}) == 1


@every
@given(
    sizes=corpora,
    length=st.integers(1, 6),
    samples=st.integers(1, 30),
    until=st.integers(0, 30),
    course=changes,
)
def test_what_a_built_index_leaves_is_read_before_the_stream(
    sizes: list[int], length: int, samples: int, until: int, course: list[tuple[int, int]], impl: Any
) -> None:
    store, stream = make(sizes, 2, 2, impl)
    assume(sum(sizes) > length)
    index_of = build_order(
        store.sizes, range(len(sizes)), seq_length=length, num_samples=samples, seed=3, impl=impl
    )
    until = min(until, len(index_of))
    built, read = BuiltStream(index_of, store.sizes), Counter[int]()
    for i in range(until):
        read.update(tokens_of(index_of.span(i), store)[:-1])
    unread = built.after(until, length)
    epochs = len(index_of.document_index) // len(sizes)
    assert read + left_in(unread, stream, built, store) == Counter(dict.fromkeys(range(sum(sizes)), epochs))
    for piece, more in course:
        order = RemainingOrder(unread, stream, built, seq_length=piece, seed=5, impl=impl)
        for i in range(more):
            read.update(sample_of(order, store, i, piece)[:-1])
        unread = order.after(more)
    whole = (
        Counter(tokens_of(stream.between(0, unread.following), store)) if unread.following else Counter[int]()
    )
    whole.update(dict.fromkeys(range(sum(sizes)), epochs))
    assert read + left_in(unread, stream, built, store) == whole


@every
@given(sizes=corpora, length=st.integers(1, 7), block=st.integers(1, 6), region=st.integers(1, 3))
def test_before_any_change_it_is_the_on_demand_order(
    sizes: list[int], length: int, block: int, region: int, impl: Any
) -> None:
    store, stream = make(sizes, block, region, impl)
    assume(sum(sizes) > length)
    plain = on_demand(store, length, 50, block, region, impl)
    order = RemainingOrder(Remaining(), stream, None, seq_length=length, seed=5, impl=impl)
    for i in range(50):
        assert sample_of(order, store, i, length) == tokens_of(plain.span(i), store)


def test_pieces_are_read_in_another_order_than_they_lie() -> None:
    store, stream = make([40] * 10, 2, 2, None)
    order = RemainingOrder(
        RemainingOrder(Remaining(), stream, None, seq_length=4, seed=5).after(15),
        stream,
        None,
        seq_length=3,
        seed=5,
    )
    starts = [sample_of(order, store, i, 3)[0] for i in range(20)]
    assert starts != sorted(starts)
    with pytest.raises(IndexError):
        next(order.spans(-1))
