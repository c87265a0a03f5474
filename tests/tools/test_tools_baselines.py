"""tools/baselines.py counts the targets that the evaluation counts: with --eod-mask-loss none that begins a
document.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.order.index_files import IndexCache
from megatron_hyperrouter.data.store.token_files import IndexedWriter
from megatron_hyperrouter.data.stream.dataset import Builder, Splits
from megatron_hyperrouter.errors import DataError
from megatron_hyperrouter.evaluate.ngram import NgramBaselines

EOD, VOCABULARY, LENGTH = 7, 8, 9
BYTES_V = np.array([1, 2, 1, 3, 1, 1, 2, 0])


@pytest.fixture
def tool() -> ModuleType:
    from megatron_hyperrouter.commands.models import baselines

    return baselines


def splits(tmp_path: Path, *, pack: bool) -> tuple[Splits, list[list[int]]]:
    """Training and test are the same documents, each of which a packed sample holds."""
    random = np.random.default_rng(0)
    documents = [
        [*random.integers(0, EOD, size).tolist(), EOD] for size in random.integers(0, LENGTH + 1, 60)
    ]
    with IndexedWriter(tmp_path / "p", np.uint16) as writer:
        for document in documents:
            writer.add_document(np.array(document))
    data = DataConfig(
        train_data_path=(str(tmp_path / "p"),), test_data_path=(str(tmp_path / "p"),), pack_documents=pack
    )
    builder = Builder(data, LENGTH, 1, VOCABULARY, IndexCache(), None, EOD)
    return Splits(builder.build(0, None), None, builder.build(2, None)), documents


def bits(documents: list[list[int]], fitted: NgramBaselines) -> dict[str, float]:
    """Of all targets in documents alone, by hand."""
    pairs = [(document[i], document[i + 1]) for document in documents for i in range(len(document) - 1)]
    total = sum(int(BYTES_V[target]) for _, target in pairs)
    unigram = sum(-math.log2(fitted.unigram_V[target]) for _, target in pairs)
    bigram = sum(
        -math.log2(fitted.bigram_N(np.array([context]), np.array([target]))[0]) for context, target in pairs
    )
    return {"unigram": unigram / total, "bigram": bigram / total}


def test_packed_documents_count_as_each_alone(tool: ModuleType, tmp_path: Path) -> None:
    data, documents = splits(tmp_path, pack=True)
    counted = sum(len(document) - 1 for document in documents)
    found = tool.baseline_bits(data, counted, BYTES_V, VOCABULARY, eod=EOD)
    fitted = NgramBaselines([np.array(document) for document in documents if len(document) > 1], VOCABULARY)
    assert found == pytest.approx(bits(documents, fitted), rel=1e-12)
    assert tool.baseline_bits(data, len(data.test) * LENGTH, BYTES_V, VOCABULARY) != pytest.approx(
        found, rel=1e-2
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"results": [{"topk": 1, "accuracy": 0.5}]}, "contains no evaluation results"),
        ({"results": [1]}, "contains no evaluation results"),
        ({"split": "valid"}, "contains an evaluation of the valid split"),
        ({"eval_stride": 4}, "contains an evaluation with --eval-stride 4"),
        ({"data": ["a"]}, "contains an evaluation with --data-path a"),
        ({"data": 5}, "contains no evaluation results"),
    ],
)
def test_results_of_other_tokens_are_refused(
    tool: ModuleType, tmp_path: Path, content: dict[str, Any], words: str
) -> None:
    rows = [{"topk": 1, "lm_loss": None, "bits_per_byte": None, "tokens": 9}]
    (tmp_path / "e.json").write_text(json.dumps({"results": rows, "split": "test"} | content))
    with pytest.raises(DataError, match=words):
        tool.read_results(tmp_path / "e.json")


@pytest.mark.parametrize(
    ("evaluated", "counted", "fine"),
    [
        (None, ["b"], False),
        (None, ["own"], True),
        (["own"], None, True),
        (["a"], ["b"], False),
        (["a"], ["own"], False),
        (["x/a"], ["y/a"], True),  # moved
    ],
)
def test_the_data_of_both_are_compared(
    tool: ModuleType, tmp_path: Path, evaluated: list[str] | None, counted: list[str] | None, fine: bool
) -> None:
    rows = [{"topk": 1, "bits_per_byte": 1.0, "tokens": 9}]
    (tmp_path / "e.json").write_text(json.dumps({"results": rows, "split": None, "data": evaluated}))
    arguments = (tmp_path / "e.json", counted, lambda words: words == ["own"])
    if fine:
        assert tool.read_results(*arguments) == rows
    else:
        with pytest.raises(DataError, match="contains an evaluation"):
            tool.read_results(*arguments)


def test_a_loss_that_is_not_finite_has_a_row(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    tool.show({"bigram": 2.0, "model": None}, 9, masked=False)
    assert "model" in capsys.readouterr().out


@pytest.mark.parametrize("eod", [None, EOD])
def test_the_first_samples_are_counted(tool: ModuleType, tmp_path: Path, eod: int | None) -> None:
    data, _ = splits(tmp_path, pack=False)
    assert data.train is not None and data.test is not None
    rows: list[Any] = [data.test[i].tolist() for i in range(4)]
    pieces = [[pair for pair in pairwise(row) if pair[0] != eod] for row in rows]
    found = tool.baseline_bits(data, sum(map(len, pieces)), BYTES_V, VOCABULARY, eod=eod)
    trained = [data.train[i].tolist() for i in range(len(data.train))]
    parts = [
        np.array(part)
        for row in trained
        for part in (documents_in(row) if eod is not None else [row])
        if len(part) > 1
    ]
    fitted = NgramBaselines(parts, VOCABULARY)
    assert found == pytest.approx(bits([list(pair) for piece in pieces for pair in piece], fitted), rel=1e-12)


def documents_in(row: list[int]) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for token in row:
        found[-1].append(token)
        if token == EOD:
            found.append([])
    return found


@pytest.mark.parametrize("wrong", [LENGTH * 3 + 1, 10**6])
def test_other_results_are_refused(tool: ModuleType, tmp_path: Path, wrong: int) -> None:
    data, _ = splits(tmp_path, pack=False)
    with pytest.raises(DataError, match=f"cover {wrong:,} tokens"):
        tool.baseline_bits(data, wrong, BYTES_V, VOCABULARY)
