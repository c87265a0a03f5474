"""The first global batches of a split: no sample is used twice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_hyperrouter.evaluate.selection import at_most, first_batches


class Run:
    """A run whose test split has 10 samples in an epoch; asked for more, its dataset repeats them."""

    global_batch_size = 4

    def dataset(self, tokenizer: Any, *, split: str | None, data_path: Any, samples: int | None) -> list[int]:
        return [number % 10 for number in range(10 if samples is None else samples)]


@pytest.mark.parametrize(("batches", "used"), [(None, None), (1, 4), (2, 8), (3, None), (100, None)])
def test_each_sample_once(batches: int | None, used: int | None) -> None:
    dataset, samples = first_batches(Run(), SimpleNamespace(), batches)  # type: ignore[arg-type]
    assert samples == used
    assert list(dataset) == list(range(used or 10))  # type: ignore[call-overload]


def test_training_data_are_not_counted() -> None:
    found = first_batches(Run(), SimpleNamespace(), 3, split="train")  # type: ignore[arg-type]
    assert found[1] == 12


@pytest.mark.parametrize(("flag", "reported"), [("--eval-iters", True), ("", False)])
def test_too_many_are_reported_where_they_were_asked_for(
    capsys: pytest.CaptureFixture[str], flag: str, reported: bool
) -> None:
    assert at_most(Run(), 5, most=10, flag=flag) is None  # type: ignore[arg-type]
    assert ("--eval-iters 5 selects 20 samples, but there are only 10" in capsys.readouterr().out) == reported
