"""Runs whose settings change at a resume read each token once per epoch; a run that does not change keeps
megatron-core's order.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_hyperrouter.config.schedules.batch_sizes import BatchSizes
from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.order.index_files import IndexCache
from megatron_hyperrouter.data.order.on_demand import OnDemandOrder
from megatron_hyperrouter.data.store.token_files import IndexedWriter
from megatron_hyperrouter.data.stream.dataset import Builder, build_splits
from megatron_hyperrouter.data.stream.loader import Batches
from megatron_hyperrouter.data.stream.segments import Ledger, build_training_samples, splits_of_run
from megatron_hyperrouter.errors import CheckpointError, DataError

VOCABULARY = 60_000
MOST = 20_000  # tokens of a file


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


def builder(
    words: tuple[str, ...],
    *,
    length: int = 6,
    kind: Any = "materialised",
    seed: int = 7,
    split: str = "1,0,0",
) -> Builder:
    data = DataConfig(data_path=words, split=split, data_index=kind)
    return Builder(data, seq_length=length, seed=seed, vocab_size=VOCABULARY, cache=IndexCache())


def course_of(first: Builder, mixes: Any, ledger: Ledger, *, batch: int, **steps: int) -> Any:
    given = json.loads(json.dumps(ledger))
    return build_training_samples(first, mixes, given, sizes=BatchSizes(batch), **steps)


@pytest.mark.parametrize("kind", ["materialised", "on-demand"])
@pytest.mark.parametrize("weights", [False, True])
def test_without_a_change_it_is_the_dataset_as_before(
    files: dict[str, str], kind: Any, weights: bool
) -> None:
    words = ("0.3", files["a"], "0.7", files["c"]) if weights else (files["a"], files["c"])
    first = builder(words, kind=kind)
    plain = build_splits(
        first.data,
        seq_length=6,
        seed=7,
        vocab_size=VOCABULARY,
        train_samples=80,
        valid_samples=0,
        test_samples=0,
    ).train
    assert plain is not None
    mixes = ((0, words),)
    run = splits_of_run(
        first, mixes, [], step=0, train_iters=20, sizes=BatchSizes(4), valid_samples=0, test_samples=0
    ).train
    ledger = run.ledger(11)  # type: ignore[union-attr]
    resumed = course_of(builder(words, kind=kind), mixes, ledger, step=11, train_iters=20, batch=4)
    for i in range(80):
        assert run[i].tolist() == plain[i].tolist() == resumed[i].tolist()  # type: ignore[index]
    assert resumed.ledger(15) == run.ledger(15) and len(ledger) == 1  # type: ignore[union-attr]
    assert sum(entry["samples"] for entry in ledger[0]["sets"]) == 44


@pytest.mark.parametrize("kind", ["materialised", "on-demand"])
def test_a_batch_that_grows_reads_on_where_the_mix_changes(files: dict[str, str], kind: Any) -> None:
    """A growing batch reads what a constant one reads, if both have read equally many at the change."""
    grows = BatchSizes(8, (2, 2, 24))  # 2 2 2 2 | 4 4 | 6 6 | 8 8 ...: 16 samples before the change
    mixes = ((0, (files["a"], files["c"])), (6, ("0.5", files["a"], "0.5", files["b"])))
    first = builder((files["a"], files["c"]), kind=kind)
    run = build_training_samples(first, mixes, [], step=0, train_iters=10, sizes=grows)
    assert [grows.samples(step) for step in (6, 10)] == [16, 44] and len(run) == 44
    equal = ((0, mixes[0][1]), (4, mixes[1][1]))  # 4 steps of 4 samples
    plain = build_training_samples(first, equal, [], step=0, train_iters=11, sizes=BatchSizes(4))
    samples = [run[i].tolist() for i in range(44)]
    assert samples == [plain[i].tolist() for i in range(44)]
    for step in (3, 6, 8):
        again = build_training_samples(
            first, mixes, json.loads(json.dumps(run.ledger(step))), step=step, train_iters=10, sizes=grows
        )
        done = grows.samples(step)
        assert [again[i].tolist() for i in range(done, 44)] == samples[done:]
        assert again.consumed(9) == run.consumed(9) == (36, 36 * 6)


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[list[int]], list[Part]]:
    """Sizes of the documents of each file, and the parts of a run over them."""
    sizes = draw(
        st.lists(
            st.lists(st.one_of(st.integers(0, 2), st.integers(0, 20)), max_size=12), min_size=1, max_size=3
        )
    )
    # the least with which samples of one token can be made of two thirds of it
    sizes = [[3, *each] for each in sizes]
    split = draw(st.sampled_from(["1,0,0", "2,1,0"]))
    kinds = draw(st.sampled_from([["materialised"], ["on-demand"], ["materialised", "on-demand"]]))
    parts: list[Part] = []
    for _ in range(draw(st.integers(1, 5))):
        steps = {"steps": draw(st.integers(0, 12)), "planned": draw(st.integers(0, 9))}
        if parts and draw(st.booleans()):  # goes on as before, perhaps for longer than was planned
            parts.append(replace(parts[-1], **steps))
            continue
        mixes = draw(st.lists(st.permutations(range(len(sizes))).flatmap(_some), min_size=1, max_size=3))
        longest = min(sum(part_of(sizes[file], split)) for mix in mixes for file in mix) - 1
        micro, ranks, accumulated = (draw(st.integers(1, 2)) for _ in range(3))
        parts.append(
            Part(
                mixes,
                weighted=draw(st.booleans()),
                kind=draw(st.sampled_from(kinds)),
                length=min(draw(st.integers(1, 12)), longest),
                micro=micro,
                ranks=ranks,
                batch=micro * ranks * accumulated,
                seed=draw(st.sampled_from([7, 7, 8])),
                split=split,
                **steps,
            )
        )
    return sizes, parts


def part_of(sizes: list[int], split: str) -> list[int]:
    """Of the documents, those that training reads."""
    return sizes if split == "1,0,0" else sizes[: round(len(sizes) * 2 / 3)]


def _some(order: list[int]) -> st.SearchStrategy[list[int]]:
    return st.integers(1, len(order)).map(lambda count: order[:count])


@dataclass
class Part:
    """What a run does until it is stopped: a mix, or several that follow each other after a third of the
    steps each.
    """

    mixes: list[list[int]]
    weighted: bool
    kind: str
    length: int
    micro: int
    ranks: int
    batch: int
    steps: int
    planned: int  # steps more that it would have taken
    seed: int
    split: str

    def read(self, paths: list[str], ledger: Ledger, step: int, counts: list[Counter[int]]) -> Ledger:
        """The ledger after these steps, whose inputs on all ranks are counted."""
        words = [
            tuple(word for file in mix for word in ([str(file + 1)] if self.weighted else []) + [paths[file]])
            for mix in self.mixes
        ]
        third = -(-(self.steps + self.planned) // 3) or 1
        schedule = tuple((step + number * third if number else 0, mix) for number, mix in enumerate(words))
        now = builder(words[0], length=self.length, kind=self.kind, seed=self.seed, split=self.split)
        made = course_of(
            now, schedule, ledger, step=step, train_iters=step + self.steps + self.planned, batch=self.batch
        )
        sizes = {
            "micro_batch_size": self.micro,
            "global_batch_size": self.batch,
            "data_size": self.ranks,
            "num_workers": 0,
        }
        for rank in range(self.ranks):
            with Batches(made, start_step=step, num_steps=self.steps, data_rank=rank, **sizes) as batches:
                for tokens_BS, labels_BS in batches:
                    assert tokens_BS.shape == labels_BS.shape == (self.micro, self.length)
                    for token in tokens_BS.flatten().tolist():
                        file, place = divmod(token, MOST)
                        counts[file][place] += 1
        told: Ledger = made.ledger(step + self.steps)
        return told


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(run=runs())
@example(  # read to the last sample of a limited order, behind which a shard begins
    run=(
        [[3], [0, 0, 0, 1, 2]],
        [
            Part(
                [[0, 1], [0]],
                weighted=False,
                kind="on-demand",
                length=2,
                micro=1,
                ranks=1,
                batch=2,
                seed=7,
                split="1,0,0",
                steps=0,
                planned=1,
            )
        ],
    )
)
def test_each_token_is_read_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    run: tuple[list[list[int]], list[Part]],
) -> None:
    """Counted by hand, whatever changes on the way: once the run has read on to the end of an epoch, all
    counts are equal.
    """
    for name, value in (("block", 2), ("shard", 2)):  # else a shard would be the whole file
        monkeypatch.setitem(OnDemandOrder.__init__.__kwdefaults__, name, value)
    sizes, parts = run
    folder = tmp_path_factory.mktemp("counted")
    paths = [numbered(folder / str(file), each, first=file * MOST) for file, each in enumerate(sizes)]
    counts, ledger, step = [Counter[int]() for _ in paths], [], 0
    for part in parts:
        ledger = part.read(paths, ledger, step, counts)
        step += part.steps
    # no index was made for more
    reach = sum((part.steps + part.planned) * part.batch * part.length for part in parts)
    for file, each in enumerate(sizes):
        tokens, read = sum(part_of(each, parts[0].split)), counts[file].total()
        epochs = -(-max(read, 2 * reach) // tokens) + 2
        # An index for a number of samples would stop anywhere in its last epoch.
        end = Part([[file]], False, "on-demand", 1, 1, 1, 1, epochs * tokens - read, 0, 7, parts[0].split)
        end.read(paths, ledger, step, counts)
        assert counts[file] == dict.fromkeys(range(tokens), epochs)


def numbered(prefix: Path, sizes: list[int], *, first: int) -> str:
    """Documents of these sizes whose tokens count up from ``first``."""
    with IndexedWriter(prefix, np.uint16) as writer:
        for size in sizes:
            writer.add_document(np.arange(first, first + size))
            first += size
    return str(prefix)


def test_a_schedule_switches_at_its_steps_and_comes_back(files: dict[str, str]) -> None:
    mixes = (
        (0, (files["a"],)),
        (4, (files["b"],)),
        (6, ("0.5", files["a"], "0.5", files["b"])),
        (10, (files["c"],)),
    )
    first = builder((files["a"],), length=4)
    made = course_of(first, mixes, [], step=0, train_iters=14, batch=2)
    ids = {name: set(first.open(path).tokens.tolist()) for name, path in files.items()}
    sources = ["".join(name for name in "abc" if set(made[i].tolist()) <= ids[name]) for i in range(28)]
    assert sources[:8] == ["a"] * 8 and sources[8:12] == ["b"] * 4 and sources[20:] == ["c"] * 8
    assert sorted(sources[12:20]) == ["a"] * 4 + ["b"] * 4
    inputs = Counter(int(token) for i in range(28) for token in made[i][:-1])
    assert max(inputs.values()) == 1  # less than an epoch of each
    for step in range(15):  # resumed anywhere, it is the same run
        again = course_of(
            builder((files["a"],), length=4), mixes, made.ledger(step), step=step, train_iters=14, batch=2
        )
        assert [again[i].tolist() for i in range(step * 2, 28)] == [
            made[i].tolist() for i in range(step * 2, 28)
        ]
        assert again.ledger(14) == made.ledger(14)


def test_another_mix_is_reported(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = (files["a"],)
    ledger = course_of(builder(words), ((0, words),), [], step=0, train_iters=5, batch=2).ledger(3)
    for ending in (".bin", ".idx"):
        shutil.copy2(files["a"] + ending, tmp_path / f"moved{ending}")
    both = ("0.5", files["a"], "0.5", files["b"])
    for now, told in (
        (words, False),
        ((str(tmp_path / "moved"),), False),  # the same text under another name
        ((files["b"],), True),
        (both, True),
    ):
        capsys.readouterr()
        course_of(builder(now), ((0, now),), ledger, step=3, train_iters=5, batch=2)
        said = f"the training data were {files['a']} in the checkpoint and are now {' '.join(now)}: the run"
        assert (said in capsys.readouterr().out) == told
    scheduled = ((0, words), (3, both))
    capsys.readouterr()
    course_of(builder(words), scheduled, ledger, step=3, train_iters=5, batch=2)
    assert "training data were" not in capsys.readouterr().out


def test_another_part_of_a_file_is_refused(files: dict[str, str]) -> None:
    words = (files["a"],)
    ledger = course_of(builder(words), ((0, words),), [], step=0, train_iters=5, batch=2).ledger(3)
    other = builder(words, length=5)
    with pytest.raises(
        CheckpointError,
        match=r"has read documents \[0, 42\] with .* select documents \[0, 21\]",
    ):
        course_of(
            replace(other, data=replace(other.data, split="1,1,0")),
            ((0, words),),
            ledger,
            step=3,
            train_iters=5,
            batch=2,
        )
    for segment in ledger:  # as older checkpoints have it
        for entry in segment["sets"]:
            entry["tokens"] -= 1
            del entry["file"]
    with pytest.raises(CheckpointError, match="has read documents"):
        course_of(builder(words), ((0, words),), ledger, step=3, train_iters=5, batch=2)


@pytest.mark.parametrize("kind", ["materialised", "on-demand"])
def test_samples_longer_than_a_file_are_refused_after_a_change_too(tmp_path: Path, kind: Any) -> None:
    words = (numbered(tmp_path / "a", [4, 0, 5], first=0),)
    ledger = course_of(
        builder(words, length=4, kind=kind), ((0, words),), [], step=0, train_iters=3, batch=1
    ).ledger(1)
    whole = course_of(
        builder(words, length=8, kind=kind), ((0, words),), ledger, step=1, train_iters=3, batch=1
    )
    assert len(whole[1]) == len(whole[2]) == 9
    with pytest.raises(
        DataError,
        match=r"a\.bin: the train split .*, with 9 tokens, but one sample needs 10 tokens \(--seq-length 9",
    ):
        course_of(builder(words, length=9, kind=kind), ((0, words),), ledger, step=1, train_iters=3, batch=1)
