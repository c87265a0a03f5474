"""A run that is extended keeps its order wherever the longer run would have had the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data.test_data_segments import builder, course_of, files

from megatron_hyperrouter import console

__all__ = ["files"]  # a fixture of that module
BATCH, STOPPED = 4, 3


def words_of(files: dict[str, str], kind: str) -> tuple[str, ...]:
    return {
        "one file": (files["c"],),
        "weights": ("0.3", files["a"], "0.7", files["c"]),
        "no weights": (files["a"], files["c"]),
    }[kind]


@pytest.mark.parametrize("index", ["materialised", "on-demand"])
@pytest.mark.parametrize("kind", ["one file", "weights", "no weights"])
@pytest.mark.parametrize("steps", [6, 40, 200])  # within an epoch, and several
def test_the_longer_run_is_the_one_that_never_stopped(
    files: dict[str, str], kind: str, index: Any, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "note", said.append)
    words = words_of(files, kind)
    mixes = ((0, words),)
    whole = course_of(builder(words, kind=index), mixes, [], step=0, train_iters=steps, batch=BATCH)
    short = course_of(builder(words, kind=index), mixes, [], step=0, train_iters=STOPPED, batch=BATCH)
    told = short.ledger(STOPPED)
    longer = course_of(builder(words, kind=index), mixes, told, step=STOPPED, train_iters=steps, batch=BATCH)
    alike = all(short[i].tolist() == whole[i].tolist() for i in range(STOPPED * BATCH))
    first = STOPPED * BATCH
    same = all(longer[i].tolist() == whole[i].tolist() for i in range(first, steps * BATCH))
    assert same or len(said) == 1, "another order is reported"
    assert same or not alike or kind == "no weights", "the order continues where it is the same so far"
    assert same or steps > 6
    assert longer.consumed(steps) == whole.consumed(steps)


def test_prolonged_twice_and_then_changed(files: dict[str, str], tmp_path: Path) -> None:
    words = words_of(files, "one file")
    mixes = ((0, words),)
    whole = course_of(builder(words), mixes, [], step=0, train_iters=9, batch=BATCH)
    told = course_of(builder(words), mixes, [], step=0, train_iters=3, batch=BATCH).ledger(3)
    again = course_of(builder(words), mixes, told, step=3, train_iters=6, batch=BATCH)
    last = course_of(builder(words), mixes, again.ledger(6), step=6, train_iters=9, batch=BATCH)
    assert [last[i].tolist() for i in range(24, 36)] == [whole[i].tolist() for i in range(24, 36)]
    assert last.ledger(9) == whole.ledger(9)
