"""Packed documents: none is cut without need, each token is read once an epoch, and no label crosses from one
to another.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines.layout_worker import EOD as ENDS
from engines.layout_worker import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_gpt import ReferenceGPT

from megatron_hyperrouter.config.schedules.batch_sizes import BatchSizes
from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.order import index
from megatron_hyperrouter.data.order.index_files import IndexCache
from megatron_hyperrouter.data.order.packed import PackedDataset, best_fit, pack
from megatron_hyperrouter.data.store.token_files import IndexedDataset, IndexedWriter
from megatron_hyperrouter.data.stream.dataset import Builder, build_splits
from megatron_hyperrouter.data.stream.segments import TrainingSamples, build_training_samples
from megatron_hyperrouter.errors import CheckpointError, DataError

EOD, VOCABULARY = 0, 60_000

every = pytest.mark.parametrize(
    "impl", [pytest.param(impl, id=name) for name, impl in sorted(index.IMPLEMENTATIONS.items())]
)


def write(prefix: Path, sizes: list[int]) -> tuple[str, list[list[int]]]:
    """A file whose tokens are all different, but for the last one of each document; and its documents."""
    documents, first = [], 1
    with IndexedWriter(prefix, np.uint16) as writer:
        for size in sizes:
            documents.append([*range(first, first + size - 1), EOD] if size else [])
            writer.add_document(np.array(documents[-1], np.uint16))
            first += size
    return str(prefix), documents


def builder(*words: str, length: int = 6, pack: bool = True) -> Builder:
    data = DataConfig(data_path=words, split="1,0,0", pack_documents=pack)
    return Builder(data, seq_length=length, seed=7, vocab_size=VOCABULARY, cache=IndexCache(), eod=EOD)


def dataset(prefix: str, length: int, impl: Any = None, *, samples: int | None = None) -> PackedDataset:
    store = IndexedDataset(prefix)
    packing = pack(store.sizes, range(len(store)), length=length + 1, seed=3, impl=impl)
    sizes = {"seq_length": length, "vocab_size": VOCABULARY, "num_samples": samples}
    return PackedDataset(store, packing, **sizes, eod=EOD, seed=3, impl=impl)  # type: ignore[arg-type]


@given(
    st.integers(1, 40).flatmap(
        lambda length: st.tuples(st.just(length), st.lists(st.integers(1, length), min_size=1, max_size=60))
    )
)
def test_best_fit_is_that_of_one_item_after_another(case: tuple[int, list[int]]) -> None:
    length, sizes = case
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append(min(fitting, default=length) - size)
    samples = best_fit(np.bincount(sizes, minlength=length + 1), length)
    held = Counter[int]()
    for sample, size in zip(samples.tolist(), sorted(sizes, reverse=True), strict=True):
        held[sample] += size
    assert sorted(length - total for total in held.values()) == sorted(rooms)
    assert sorted(held) == list(range(len(rooms)))


@every
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.sampled_from([0, 1, 2]), st.integers(0, 30)), min_size=1, max_size=40),
    length=st.integers(1, 12),
)
def test_each_token_once_and_no_document_cut_that_a_sample_holds(
    tmp_path_factory: pytest.TempPathFactory, impl: Any, sizes: list[int], length: int
) -> None:
    prefix, documents = write(tmp_path_factory.mktemp("packed") / "p", [*sizes, 1])
    one = dataset(prefix, length, impl)
    size = length + 1
    pieces = Counter[tuple[int, ...]]()
    for document in documents:  # by hand: whole, or pieces as long as a sample, and the rest
        pieces.update(tuple(document[begin : begin + size]) for begin in range(0, len(document), size))
    followed = {(a, b) for document in documents for a, b in pairwise(document)}
    ends = sum(document[-1:] == [EOD] for document in documents)
    for epoch in range(2):
        two = dataset(prefix, length, impl, samples=2 * len(one))
        found, filled = Counter[tuple[int, ...]](), 0
        for i in range(epoch * len(one), (epoch + 1) * len(one)):
            sample = two[i].tolist()
            assert len(sample) == size
            piece: list[int] = []
            for token in sample:
                piece.append(token)
                if token == EOD:
                    found[tuple(piece)] += 1
                    piece = []
            if piece:
                found[tuple(piece)] += 1
                assert piece == sample  # only what fills a sample may go on in another one
            counted = [(a, b) for a, b in pairwise(sample) if a != EOD]
            assert set(counted) <= followed
            filled += sample.count(EOD)
        # What fills samples up looks like documents of one token.
        found[(EOD,)] -= filled - ends
        assert found == pieces
    assert int(one.packing.starts[-1]) == pieces.total()


def test_epochs_differ_in_order_alone_and_a_longer_run_begins_like_a_shorter_one(tmp_path: Path) -> None:
    prefix, _ = write(tmp_path / "p", [*np.random.default_rng(1).integers(0, 20, 200).tolist()])
    one = dataset(prefix, 9)
    two = dataset(prefix, 9, samples=2 * len(one))
    first, second = ([two[epoch * len(one) + i].tolist() for i in range(len(one))] for epoch in range(2))
    assert (
        first == [sample.tolist() for sample in one] and first != second and sorted(first) == sorted(second)
    )
    for impl in index.IMPLEMENTATIONS.values():
        assert [each.tolist() for each in dataset(prefix, 9, impl)] == first
    for i in (-1, len(one)):
        with pytest.raises(IndexError):
            one[i]


def test_a_kept_packing_is_the_one_that_was_built(tmp_path: Path) -> None:
    prefix, _ = write(tmp_path / "p", [*range(60)])
    cache = IndexCache(str(tmp_path / "cache"), cached_from=0)
    samples = {"train_samples": 50, "valid_samples": 0, "test_samples": 0}
    runs = [
        build_splits(
            builder(prefix).data, seq_length=9, seed=3, vocab_size=VOCABULARY, eod=EOD, cache=cache, **samples
        ).train
        for _ in "ab"
    ]
    assert len(cache.used) == 2 and cache.used[0] == cache.used[1]
    expected = dataset(prefix, 9, samples=50)
    for i in range(50):
        assert all(run is not None and run[i].tolist() == expected[i].tolist() for run in runs)


def test_a_document_without_an_end_is_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "p", np.uint16) as writer:
        writer.add_document(np.array([4, 5, EOD]))
        writer.add_document(np.array([4, 5]))
    with pytest.raises(DataError, match=r"document 1 does not end with id 0.*--pack-documents") as caught:
        dataset(str(tmp_path / "p"), 7)[0]
    assert "--append-eod" in str(caught.value.remedy)


def test_a_foreign_token_is_found_in_a_piece_of_a_document(tmp_path: Path) -> None:
    tokens = np.arange(1, 21)
    tokens[17], tokens[19] = VOCABULARY + 1, EOD
    with IndexedWriter(tmp_path / "p", np.uint16) as writer:
        writer.add_document(np.array([4, EOD]))
        writer.add_document(tokens)
    packed = dataset(str(tmp_path / "p"), 6)
    with pytest.raises(DataError, match=rf"byte {2 * (2 + 17)}, document 1: token id {VOCABULARY + 1}"):
        for i in range(len(packed)):
            packed[i]


@pytest.mark.parametrize("apart", [True, False])
def test_the_loss_is_that_of_each_piece_alone(tmp_path: Path, apart: bool) -> None:
    """By the float64 model to which the engines are held; and not where attention goes across."""
    flags = [
        "--router.name",
        "topk",
        "--eod-mask-loss",
        *(["--reset-attention-mask", "--pack-documents"] if apart else []),
    ]
    config, random = tiny_config(flags), np.random.default_rng(5)
    shapes = {
        "input_layernorm": (32,),
        "self_attention.linear_qkv": (64, 32),
        "self_attention.q_layernorm": (8,),
        "self_attention.k_layernorm": (8,),
        "self_attention.linear_proj": (32, 32),
        "pre_mlp_layernorm": (32,),
        "router": (4, 32),
        **{f"mlp.experts.local_experts.{expert}.linear_fc1": (96, 32) for expert in range(4)},
        **{f"mlp.experts.local_experts.{expert}.linear_fc2": (32, 48) for expert in range(4)},
    }
    named = {
        f"decoder.layers.{layer}.{name}.weight": shape for layer in range(2) for name, shape in shapes.items()
    }
    named |= {"embedding.word_embeddings.weight": (64, 32), "decoder.final_layernorm.weight": (32,)}
    weights = {name: torch.from_numpy(random.normal(0, 0.3, shape)) for name, shape in named.items()}
    model = ReferenceGPT(
        config, weights, lambda w, layer: w[f"decoder.layers.{layer}.router.weight"], eod=ENDS
    )
    documents = [
        [*random.integers(0, ENDS, size - 1).tolist(), ENDS][-size:] for size in (5, 1, 40, 9, 17, 3, 7)
    ]
    with IndexedWriter(tmp_path / "p", np.uint16) as writer:
        for document in documents:
            writer.add_document(np.array(document))
    packed = builder(str(tmp_path / "p"), length=16)
    packed.eod = ENDS
    samples = packed.one(str(tmp_path / "p"), 0, None)

    def total(rows: list[list[int]]) -> float:
        with torch.no_grad():
            return sum(
                float(model.loss(torch.tensor([row[:-1]]), torch.tensor([row[1:]]), 2)[0]) for row in rows
            )

    alone = [document[begin : begin + 17] for document in documents for begin in range(0, len(document), 17)]
    found = total([samples[i].tolist() for i in range(len(samples))])
    assert (found == pytest.approx(total([piece for piece in alone if len(piece) > 1]), rel=1e-12)) is apart


def course_of(first: Builder, ledger: Any, *, step: int, train_iters: int, batch: int = 2) -> TrainingSamples:
    return build_training_samples(
        first,
        ((0, first.data.data_path),),
        ledger,
        step=step,
        train_iters=train_iters,
        sizes=BatchSizes(batch),
    )


@pytest.mark.parametrize("weights", [(), ("0.3", "0.7")])
def test_a_run_goes_on_where_it_stopped_and_further_than_planned(
    tmp_path: Path, weights: tuple[str, ...]
) -> None:
    paths = [write(tmp_path / name, [3, 9, 1, 30, 5, 5, 2] * 3)[0] for name in "ab"]
    words = (
        tuple(word for pair in zip(weights, paths, strict=True) for word in pair) if weights else (paths[0],)
    )
    whole = course_of(builder(*words), [], step=0, train_iters=60)
    stopped = course_of(builder(*words), [], step=0, train_iters=20)
    resumed = course_of(builder(*words), stopped.ledger(7), step=7, train_iters=60)
    assert [resumed[i].tolist() for i in range(14, 120)] == [whole[i].tolist() for i in range(14, 120)]
    assert resumed.ledger(33) == whole.ledger(33) and resumed.consumed(33) == (66, 396)


def test_what_cannot_go_on_is_refused(tmp_path: Path) -> None:
    prefix, other = (
        write(tmp_path / name, [3, 9, 1, 30, 5, 5, size] * 3)[0] for name, size in (("a", 2), ("b", 4))
    )
    packed = course_of(builder(prefix), [], step=0, train_iters=9).ledger(4)
    for changed, batch, name in (
        (builder(prefix, length=5), 2, "--seq-length was 6 and is now 5"),
        (builder(prefix), 3, "--global-batch-size was 2 and is now 3"),
        (builder(other), 2, f"--data-path was {prefix} and is now {other}\n"),
        (builder(prefix, pack=False), 2, "--pack-documents was true and is now false"),
    ):
        with pytest.raises(CheckpointError, match=name):
            course_of(changed, packed, step=4, train_iters=9, batch=batch)
    plain = course_of(builder(prefix, pack=False), [], step=0, train_iters=9).ledger(4)
    with pytest.raises(CheckpointError, match="--pack-documents was false and is now true"):
        course_of(builder(prefix), plain, step=4, train_iters=9)
    both = course_of(builder(prefix, other), [], step=0, train_iters=9).ledger(4)
    course_of(builder(prefix, other), both, step=4, train_iters=9)
    with pytest.raises(CheckpointError, match="planned for 18 samples"):
        course_of(builder(prefix, other), both, step=4, train_iters=10)


def test_packing_needs_the_end_of_documents(tmp_path: Path) -> None:
    prefix, _ = write(tmp_path / "p", [9, 9])
    without = builder(prefix)
    without.eod = None
    with pytest.raises(ValueError, match="eod"):
        without.build(0, 3)
