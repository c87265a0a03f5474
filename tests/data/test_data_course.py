"""Runs that change on the way: each token once an epoch, and a run that does not change is megatron-core's order as before."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from data.test_data_unread import left_in, tokens_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.cache import Cache
from megatron_hyperrouter.data.course import Ledger, _replay, _Set, build_course, splits_of_run
from megatron_hyperrouter.data.dataset import Builder, build_splits
from megatron_hyperrouter.data.store import IndexedWriter
from megatron_hyperrouter.errors import CheckpointError

VOCABULARY = 60_000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three files; every token of all of them is another id."""
    folder = tmp_path_factory.mktemp("course")
    random, first, prefixes = np.random.default_rng(0), 0, {}
    for name, documents in (("a", 40), ("b", 9), ("c", 90)):
        with IndexedWriter(folder / name, np.uint16) as writer:
            for size in [0, 1, *random.integers(0, 25, documents)]:
                writer.add_document(np.arange(first, first + size))
                first += int(size)
        prefixes[name] = str(folder / name)
    assert first < VOCABULARY
    return prefixes


def builder(words: tuple[str, ...], *, length: int = 6, kind: Any = "materialised", seed: int = 7) -> Builder:
    data = DataConfig(data_path=words, split="1,0,0", data_index=kind)
    return Builder(data, seq_length=length, seed=seed, vocab_size=VOCABULARY, cache=Cache())


def course_of(first: Builder, mixes: Any, ledger: Ledger, **steps: int) -> Any:
    return build_course(first, mixes, json.loads(json.dumps(ledger)), **steps)


@pytest.mark.parametrize("kind", ["materialised", "on-demand"])
@pytest.mark.parametrize("weights", [False, True])
def test_without_a_change_it_is_the_dataset_as_before(files: dict[str, str], kind: Any, weights: bool) -> None:
    words = ("0.3", files["a"], "0.7", files["c"]) if weights else (files["a"], files["c"])
    first = builder(words, kind=kind)
    plain = build_splits(first.data, seq_length=6, seed=7, vocab_size=VOCABULARY, train_samples=80, valid_samples=0, test_samples=0).train
    assert plain is not None
    mixes = ((0, words),)
    run = splits_of_run(first, mixes, [], step=0, train_iters=20, batch=4, valid_samples=0, test_samples=0).train
    ledger = run.ledger(11)  # type: ignore[union-attr]
    resumed = course_of(builder(words, kind=kind), mixes, ledger, step=11, train_iters=20, batch=4)
    for i in range(80):
        assert run[i].tolist() == plain[i].tolist() == resumed[i].tolist()  # type: ignore[index]
    assert resumed.ledger(15) == run.ledger(15) and len(ledger) == 1  # type: ignore[union-attr]
    assert sum(entry["samples"] for entry in ledger[0]["sets"]) == 44


changes = st.lists(
    st.tuples(
        st.integers(1, 9),  # sequence length
        st.integers(1, 5),  # batch
        st.integers(1, 12),  # steps
        st.sampled_from(["a", "b", "ab", "ca", "abc"]),
        st.booleans(),  # weights
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("kind", ["materialised", "on-demand"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=25)
@given(course=changes)
def test_each_token_is_read_once_an_epoch(files: dict[str, str], kind: Any, course: list[tuple[int, int, int, str, bool]]) -> None:
    ledger: Ledger = []
    step, read = 0, Counter[int]()
    for length, batch, steps, names, weighed in course:
        words = tuple(word for n, name in enumerate(names) for word in ([str(n + 1)] if weighed else []) + [files[name]])
        # The run is planned to go on for three more steps, and stopped
        now, mixes = builder(words, length=length, kind=kind), ((0, words),)
        made = course_of(now, mixes, ledger, step=step, train_iters=step + steps + 3, batch=batch)
        for i in range(step * batch, (step + steps) * batch):
            sample = made[i]
            assert len(sample) == length + 1
            read.update(sample[:-1].tolist())
        step += steps
        ledger = made.ledger(step)
    sets: dict[str, _Set] = {}
    for segment in json.loads(json.dumps(ledger)):
        _replay(segment, builder(tuple(files.values()), kind=kind), sets)
    expected = Counter[int]()
    for known in sets.values():
        store = known.store
        places = _Places(store)
        assert known.unread is not None
        left = left_in(known.unread, known.stream, known.built, places)
        whole = Counter(tokens_of(known.stream.between(0, known.unread.following), places)) if known.unread.following else Counter[int]()
        if known.built is not None:
            epochs = len(known.built.order.document_index) // len(store)
            whole.update(dict.fromkeys(range(len(store.tokens)), epochs))
        expected.update({int(store.tokens[token]): count for token, count in (whole - left).items()})
        assert not left - whole
    assert read == expected


class _Places:
    """Where documents lie, for ``tokens_of``."""

    def __init__(self, store: Any) -> None:
        self.sizes, self.starts = store.sizes, store.pointers // store.dtype.itemsize


def test_a_schedule_switches_at_its_steps_and_comes_back(files: dict[str, str]) -> None:
    mixes = ((0, (files["a"],)), (4, (files["b"],)), (6, ("0.5", files["a"], "0.5", files["b"])), (10, (files["c"],)))
    first = builder((files["a"],), length=4)
    made = course_of(first, mixes, [], step=0, train_iters=14, batch=2)
    ids = {name: set(first.open(path).tokens.tolist()) for name, path in files.items()}
    sources = ["".join(name for name in "abc" if set(made[i].tolist()) <= ids[name]) for i in range(28)]
    assert sources[:8] == ["a"] * 8 and sources[8:12] == ["b"] * 4 and sources[20:] == ["c"] * 8
    assert sorted(sources[12:20]) == ["a"] * 4 + ["b"] * 4
    inputs = Counter(int(token) for i in range(28) for token in made[i][:-1])
    assert max(inputs.values()) == 1  # less than an epoch of each
    for step in range(15):  # resumed anywhere, it is the same run
        again = course_of(builder((files["a"],), length=4), mixes, made.ledger(step), step=step, train_iters=14, batch=2)
        assert [again[i].tolist() for i in range(step * 2, 28)] == [made[i].tolist() for i in range(step * 2, 28)]
        assert again.ledger(14) == made.ledger(14)


def test_another_file_of_that_name_is_refused(files: dict[str, str]) -> None:
    words = (files["a"],)
    ledger = course_of(builder(words), ((0, words),), [], step=0, train_iters=5, batch=2).ledger(3)
    other = builder(words, length=5)
    with pytest.raises(CheckpointError, match="has read documents"):
        course_of(replace(other, data=replace(other.data, split="1,1,0")), ((0, words),), ledger, step=3, train_iters=5, batch=2)
