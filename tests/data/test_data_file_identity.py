"""A run that goes on knows its files by what they hold: another file of the name is refused, a copy of
another name is not.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import write_corpus
from data.test_data_course import builder, course_of

from megatron_hyperrouter.data.store.token_files import IndexedDataset, IndexedWriter
from megatron_hyperrouter.data.stream.file_identity import identity
from megatron_hyperrouter.data.stream.segments import Course, Ledger
from megatron_hyperrouter.errors import CheckpointError, DataError

SIZES = [7, 0, 30, 12, 1, 25] * 4


def resumed(words: tuple[str, ...], ledger: Ledger, **how: Any) -> Course:
    course: Course = course_of(builder(words, **how), ((0, words),), ledger, step=3, train_iters=5, batch=2)
    return course


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    return write_corpus(tmp_path / "a", SIZES), write_corpus(tmp_path / "b", SIZES, seed=1)


@pytest.fixture
def ledger(two: tuple[str, str]) -> Ledger:
    told: Ledger = course_of(builder(two), ((0, two),), [], step=0, train_iters=5, batch=2).ledger(3)
    return told


def samples(course: Course) -> list[list[int]]:
    return [course[i].tolist() for i in range(6, 10)]


HAD = "it had 24 documents with 300 tokens"
CHANGES = {
    "another file": (
        lambda prefix: write_corpus(prefix, SIZES, seed=9),
        f"{HAD}, and has as many, but their digest was",
    ),
    "a longer one": (
        lambda prefix: write_corpus(prefix, [*SIZES, 3]),
        f"{HAD}, and has 25 documents with 303 tokens",
    ),
    "cut otherwise": (lambda prefix: recut(prefix), f"{HAD}, and has as many, but their digest was"),
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
        DataError, match=rf"another file of the same name:\n  - {two[1]}: {message}"
    ) as caught:
        resumed(two, ledger, **how)
    assert "--finetune" in caught.value.remedy
    resumed(two[:1], ledger)  # which does not read it any more


def test_each_file_is_named(two: tuple[str, str], ledger: Ledger) -> None:
    for prefix in two:
        write_corpus(Path(prefix), [300])
    with pytest.raises(
        DataError, match=rf"(?s)other files .*{two[0]}: it had 24 .*{two[1]}: it had 24 .* has 1 documents"
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
    assert capsys.readouterr().out.startswith(f"note: {moved} is what the checkpoint knows as {two[0]}")
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
    with pytest.raises(CheckpointError, match="stands twice in the mix"):
        resumed(words, told, length=5)


def test_of_two_equal_files_none_is_taken_for_another(tmp_path: Path, capsys: Any) -> None:
    old = tuple(write_corpus(tmp_path / name, SIZES) for name in "ab")
    new = tuple(write_corpus(tmp_path / name, SIZES) for name in "c")
    told = course_of(builder(old), ((0, old),), [], step=0, train_iters=5, batch=2).ledger(3)
    assert resumed(new, told).ledger(3)[0]["mix"] == list(old) and not capsys.readouterr().out


def test_an_identity_is_of_the_whole_file(tmp_path: Path) -> None:
    """Of a large one of samples of it, but from end to end."""
    prefix = write_corpus(tmp_path / "a", [2000] * 50)
    first = identity(IndexedDataset(prefix))
    assert (first["documents"], first["tokens"]) == (50, 100_000)
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    for place in (0, len(content) - 1, (len(content) - 4096) * 3 // 7):
        changed = bytearray(content)
        changed[place] ^= 1
        Path(f"{prefix}.bin").write_bytes(changed)
        assert identity(IndexedDataset(prefix)) != first
    Path(f"{prefix}.bin").write_bytes(content)
    assert identity(IndexedDataset(prefix)) == first
