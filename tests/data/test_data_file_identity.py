"""A resumed run recognises its files by their content: another file with the same name is refused, a copy
with another name is not.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import write_corpus
from data.test_data_segments import builder, course_of
from encode_settings import settings

from megatron_hyperrouter import console
from megatron_hyperrouter.config.schedules.batch_sizes import BatchSizes
from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.order.index_files import IndexCache
from megatron_hyperrouter.data.store import manifest
from megatron_hyperrouter.data.store.token_files import IndexedDataset, IndexedWriter
from megatron_hyperrouter.data.stream import file_identity
from megatron_hyperrouter.data.stream.file_identity import identity, same
from megatron_hyperrouter.data.stream.segments import Ledger, TrainingSamples, splits_of_run
from megatron_hyperrouter.data.tokenize import bpe
from megatron_hyperrouter.data.tokenize.preprocess import preprocess
from megatron_hyperrouter.data.tokenize.tokenizer import build_tokenizer
from megatron_hyperrouter.errors import CheckpointError, DataError

SIZES = [7, 0, 30, 12, 1, 25] * 4


def resumed(words: tuple[str, ...], ledger: Ledger, **how: Any) -> TrainingSamples:
    course: TrainingSamples = course_of(
        builder(words, **how), ((0, words),), ledger, step=3, train_iters=5, batch=2
    )
    return course


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    return write_corpus(tmp_path / "a", SIZES), write_corpus(tmp_path / "b", SIZES, seed=1)


@pytest.fixture
def ledger(two: tuple[str, str]) -> Ledger:
    told: Ledger = course_of(builder(two), ((0, two),), [], step=0, train_iters=5, batch=2).ledger(3)
    return told


def samples(course: TrainingSamples) -> list[list[int]]:
    return [course[i].tolist() for i in range(6, 10)]


@pytest.mark.parametrize("other", ["same", "respelled", "link", "copy", "other text"])
def test_text_of_training_is_reported_in_validation_and_test_by_any_name(
    tmp_path: Path, two: tuple[str, str], other: str, capsys: Any
) -> None:
    (tmp_path / "elsewhere").mkdir()
    held_out = {"same": two[0], "respelled": f"{tmp_path}/elsewhere/../a", "other text": two[1]}.get(
        other, str(tmp_path / "elsewhere" / "c")
    )
    for ending in ("bin", "idx"):
        if other == "link":
            os.symlink(f"{two[0]}.{ending}", f"{held_out}.{ending}")
        if other == "copy":
            shutil.copy(f"{two[0]}.{ending}", f"{held_out}.{ending}")
    data = DataConfig(train_data_path=(two[0],), valid_data_path=(held_out,), test_data_path=(held_out,))
    first = replace(builder(two), data=data)
    counts = {"step": 0, "train_iters": 2, "valid_samples": 2, "test_samples": 2}
    splits_of_run(first, ((0, (two[0],)),), [], sizes=BatchSizes(2), **counts)
    told = capsys.readouterr()
    lines = [line for line in (told.out + told.err).splitlines() if held_out in line and "warning" in line]
    assert len(lines) == (0 if other == "other text" else 2)
    for line, name in zip(lines, ("validation", "test"), strict=False):
        assert f"for {name}" in line and two[0] in line


HAD = "it had 24 documents with 300 tokens"
CHANGES = {
    "another file": (
        lambda prefix: write_corpus(prefix, SIZES, seed=9),
        "it still has 24 documents with 300 tokens, but its content has changed",
    ),
    "a longer one": (
        lambda prefix: write_corpus(prefix, [*SIZES, 3]),
        f"{HAD} and now has 25 documents with 303 tokens",
    ),
    "cut otherwise": (
        lambda prefix: recut(prefix),
        "it still has 24 documents with 300 tokens, but its content has changed",
    ),
}


def recut(prefix: Path) -> None:
    tokens = np.fromfile(f"{prefix}.bin", np.uint16)
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in np.split(tokens, np.cumsum(SIZES[::-1])[:-1]):
            writer.add_document(document)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "how",
    [{}, {"length": 5}, {"kind": "on-demand"}],
    ids=["same settings", "another length", "another index"],
)
def test_another_file_of_that_name_is_refused(
    two: tuple[str, str], ledger: Ledger, change: str, how: dict[str, Any]
) -> None:
    make, message = CHANGES[change]
    make(Path(two[1]))
    with pytest.raises(
        DataError, match=rf"a different file under this name:\n  - {two[1]}: {message}"
    ) as caught:
        resumed(two, ledger, **how)
    assert "--finetune" in caught.value.remedy
    resumed(two[:1], ledger)  # which does not read it any more


def test_each_file_is_named(two: tuple[str, str], ledger: Ledger) -> None:
    for prefix in two:
        write_corpus(Path(prefix), [300])
    with pytest.raises(
        DataError,
        match=rf"(?s)different files under these names:.*{two[0]}: it had 24 .*{two[1]}: it had 24 "
        r".* has 1 documents",
    ):
        resumed(two, ledger)


def test_copied_moved_and_touched_data_goes_on(
    tmp_path: Path, two: tuple[str, str], ledger: Ledger, capsys: Any
) -> None:
    expected = samples(resumed(two, ledger))
    moved = str(tmp_path / "elsewhere" / "web")
    Path(moved).parent.mkdir()
    for ending in ("bin", "idx"):
        shutil.move(f"{two[0]}.{ending}", f"{moved}.{ending}")
        shutil.copy(f"{two[1]}.{ending}", tmp_path / "copy")
        os.replace(tmp_path / "copy", f"{two[1]}.{ending}")
        os.utime(f"{two[1]}.{ending}", (1e9, 1e9))
    now = (moved, two[1])
    found = resumed(now, ledger)
    assert samples(found) == expected
    assert capsys.readouterr().out.startswith(
        f"note: {moved} has the same content as {two[0]} in the checkpoint"
    )
    again = found.ledger(4)
    assert len(again) == 1 and again[0]["mix"] == list(now)
    assert samples(resumed(now, again))[2:] == expected[2:] and not capsys.readouterr().out


def test_a_file_that_is_not_read_any_more_may_be_gone_and_is_known_when_it_comes_back(
    two: tuple[str, str], ledger: Ledger
) -> None:
    a, b = two
    kept = {ending: Path(f"{b}.{ending}").read_bytes() for ending in ("bin", "idx")}
    expected = course_of(
        builder((b,)), ((0, (b,)),), resumed((a,), ledger).ledger(4), step=4, train_iters=6, batch=2
    )
    for ending in kept:
        os.remove(f"{b}.{ending}")
    without = resumed((a,), ledger).ledger(4)
    for ending, content in kept.items():
        Path(f"{b}.{ending}").write_bytes(content)
    back = course_of(builder((b,)), ((0, (b,)),), without, step=4, train_iters=6, batch=2)
    assert [back[i].tolist() for i in range(8, 12)] == [expected[i].tolist() for i in range(8, 12)]
    fresh = course_of(builder((b,)), ((0, (b,)),), [], step=0, train_iters=2, batch=2)
    assert [back[i].tolist() for i in range(8, 12)] != [fresh[i].tolist() for i in range(4)]


def test_a_file_that_stands_twice_can_go_on_but_not_change(two: tuple[str, str]) -> None:
    words = (two[0], two[0])
    told = course_of(builder(words), ((0, words),), [], step=0, train_iters=5, batch=2).ledger(3)
    resumed(words, told)
    with pytest.raises(CheckpointError, match="lists this file twice"):
        resumed(words, told, length=5)


@pytest.mark.parametrize("kind", ["materialised", "on-demand"])
@pytest.mark.parametrize("shares", [("0.9", "0.1"), ("0.1", "0.9")])
def test_a_file_that_stands_twice_with_two_weights_goes_on_and_can_be_prolonged(
    two: tuple[str, str], shares: tuple[str, str], kind: Any
) -> None:
    words = (shares[0], two[0], shares[1], two[0])
    steps, whole = {"step": 0, "train_iters": 60}, ((0, words),)
    course = course_of(builder(words, kind=kind), whole, [], batch=2, **steps)
    told = course.ledger(30)
    for train_iters in (60, 61):
        again = course_of(builder(words, kind=kind), whole, told, step=30, train_iters=train_iters, batch=2)
        assert [again[i].tolist() for i in range(60, 120)] == [course[i].tolist() for i in range(60, 120)]


def test_of_two_equal_files_none_is_taken_for_another(tmp_path: Path, capsys: Any) -> None:
    old = tuple(write_corpus(tmp_path / name, SIZES) for name in "ab")
    new = tuple(write_corpus(tmp_path / name, SIZES) for name in "c")
    told = course_of(builder(old), ((0, old),), [], step=0, train_iters=5, batch=2).ledger(3)
    assert resumed(new, told).ledger(3)[0]["mix"] == list(old)
    was, now = " ".join(old), new[0]
    assert capsys.readouterr().out == (
        f"note: the training data were {was} in the checkpoint and are now {now}: the run continues with "
        "data that it has not read yet\n"
    )


def test_an_identity_is_of_the_whole_file(tmp_path: Path) -> None:
    """Of a large one of samples of it, but from end to end."""
    prefix = write_corpus(tmp_path / "a", [2000] * 50)
    first = identity(IndexedDataset(prefix))
    assert (first["documents"], first["tokens"]) == (50, 100_000)
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    for place in (0, len(content) - 1, (len(content) - 4096) * 27 // 63):
        changed = bytearray(content)
        changed[place] ^= 1
        Path(f"{prefix}.bin").write_bytes(changed)
        assert not same(identity(IndexedDataset(prefix)), first)
    Path(f"{prefix}.bin").write_bytes(content)
    assert same(identity(IndexedDataset(prefix)), first)


@pytest.fixture
def described(tmp_path: Path) -> str:
    """A pair with a manifest: as preprocessing writes it, long enough that few of its bytes are sampled."""
    text = tmp_path / "a.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"document {n} " + "abcdefg " * 400}) + "\n" for n in range(200))
    )
    (pair,) = preprocess([str(text)], str(tmp_path / "p"), settings("ByteTokenizer", append_eod=True))
    return pair.prefix


def resumed_with(prefix: str, cache: IndexCache) -> Callable[[], TrainingSamples]:
    words = (prefix,)
    told = course_of(builder(words), ((0, words),), [], step=0, train_iters=5, batch=2).ledger(3)

    def resume() -> TrainingSamples:
        course: TrainingSamples = course_of(
            replace(builder(words), cache=cache), ((0, words),), told, step=3, train_iters=5, batch=2
        )
        return course

    return resume


def test_one_byte_changed_in_place_is_refused(described: str, tmp_path: Path) -> None:
    resume = resumed_with(described, IndexCache(str(tmp_path / "cache")))
    expected = samples(resume())
    with open(f"{described}.bin", "r+b") as stream:
        stream.seek(71_015)
        stream.write(b"X")
    with pytest.raises(DataError, match=r"p_text_document\.bin: the file has changed since the run read it"):
        resume()
    with open(f"{described}.bin", "r+b") as stream:  # put back
        stream.seek(71_015)
        stream.write(described_byte(71_015))
    os.utime(f"{described}.bin", ns=(1, 1))
    assert samples(resume()) == expected


def described_byte(place: int) -> bytes:
    text = "".join(
        f"document {n} " + "abcdefg " * 400 + "\0" for n in range(200)
    )  # \0: the end of a document
    tokens = [256 if letter == "\0" else ord(letter) for letter in text]
    return np.array(tokens, np.uint16).tobytes()[place : place + 1]


def test_a_touched_or_copied_file_is_compared_once(
    described: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, read = IndexCache(str(tmp_path / "cache")), list[str]()
    resume = resumed_with(described, cache)
    monkeypatch.setattr(file_identity, "file_sum", lambda path: read.append(path) or manifest.file_sum(path))
    expected = samples(resume())
    assert not read, "its time of change is that of the checkpoint"
    os.utime(f"{described}.bin", ns=(5, 5))
    assert samples(resume()) == samples(resume()) == expected
    assert read == [f"{described}.bin", f"{described}.idx"]


def test_the_same_text_twice_in_a_blend_is_reported(
    two: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "warn", said.append)
    for ending in (".bin", ".idx"):
        shutil.copy(two[0] + ending, f"{tmp_path}/copy{ending}")
        os.symlink(two[1] + ending, f"{tmp_path}/link{ending}")
    words = (*two, f"{tmp_path}/copy", f"{tmp_path}/link")
    course_of(builder(words), ((0, words),), [], step=0, train_iters=5, batch=2)
    assert [line.split(":")[0] for line in said] == [
        f"{tmp_path}/copy has the same text as {two[0]}, so the blend reads it twice",
        f"{tmp_path}/link has the same text as {two[1]}, so the blend reads it twice",
    ]


def test_data_of_another_tokenizer_is_refused(described: str, tmp_path: Path) -> None:
    bpe.train_bpe(iter(["some text"]), 257, str(tmp_path / "t.json"))
    own, other = (
        build_tokenizer("ByteTokenizer"),
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "t.json")),
    )
    larger = build_tokenizer("NullTokenizer", vocab_size=1000)
    for tokenizer in (own, larger):
        replace(builder((described,)), tokenizer=tokenizer.identity()).open(described)
    for tokenizer in (other, build_tokenizer("NullTokenizer", vocab_size=200)):
        with pytest.raises(
            DataError, match=r"p_text_document: the data were made with the tokenizer ByteTokenizer and 257"
        ):
            replace(builder((described,)), tokenizer=tokenizer.identity()).open(described)
