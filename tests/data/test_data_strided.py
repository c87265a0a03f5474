"""Overlapping windows: every token of the split but the first of a file is scored once, with its own past."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.order.index_files import IndexCache
from megatron_hyperrouter.data.store.token_files import IndexedWriter
from megatron_hyperrouter.data.stream.dataset import Builder
from megatron_hyperrouter.data.stream.strided import StridedDataset, strided
from megatron_hyperrouter.errors import ConfigError, DataError

S = 8


def written(prefix: Path, sizes: list[int], first: int) -> str:
    """Documents whose tokens count on from ``first``."""
    with IndexedWriter(str(prefix), np.uint16) as writer:
        for size in sizes:
            writer.add_document(np.arange(first, first + size).astype(np.uint16))
            first += size
    return str(prefix)


def windows(data: DataConfig, stride: int, split: str = "test", vocab_size: int = 1000) -> StridedDataset:
    return strided(Builder(data, S, 1, vocab_size, IndexCache(None)), split, stride)


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_every_token_is_scored_once(tmp_path: Path, stride: int) -> None:
    files = (written(tmp_path / "a", [5, 30, 2], 0), written(tmp_path / "b", [25], 500))
    found = windows(DataConfig(test_data_path=files), stride)
    scored: list[int] = []
    for i in range(len(found)):
        sample = found[i]
        assert list(sample) == list(range(sample[0], sample[0] + S + 1))  # text as it stands in the file
        scored += list(sample[1:][found.unscored(i) :])
    assert len(scored) == len(set(scored))
    for first, size in ((0, 37), (500, 25)):
        own = [token for token in scored if first <= token < first + size]
        assert own == list(range(first + 1, first + 1 + len(own)))
        assert size - 1 - len(own) < stride  # no more than a stride is left at the end
    assert found.unscored(0) == 0 and found.unscored(1) == S - stride


def test_the_split_alone_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a", [20] * 10, 0)
    found = windows(DataConfig(data_path=(path,), split="8,1,1"), 4)
    assert found[0][0] == 180 and found[len(found) - 1][-1] <= 199


def test_made_up_tokens_have_windows_too() -> None:
    found = windows(DataConfig(mock_data=True), S)
    assert len(found) == ((1 << 22) - 1) // S and found[0][S] == found[1][0]


def test_a_file_that_is_cut_while_it_is_read_ends_in_a_message(tmp_path: Path) -> None:
    path = written(tmp_path / "a", [5000], 0)
    found = windows(DataConfig(test_data_path=(path,)), S)
    os.truncate(f"{path}.bin", 100)
    with pytest.raises(DataError, match=r"a\.bin, byte 100: the file now ends here"):
        found[600]


def test_refusals(tmp_path: Path) -> None:
    path = written(tmp_path / "a", [20], 0)
    data = DataConfig(test_data_path=(path,))
    for stride in (0, S + 1):
        with pytest.raises(ConfigError, match="must be from 1 to 8, the number of tokens"):
            windows(data, stride)
    with pytest.raises(ConfigError, match="pack-documents"):
        windows(DataConfig(test_data_path=(path,), pack_documents=True), 4)
    with pytest.raises(DataError, match="outside the vocabulary of 9"):
        windows(data, 4, vocab_size=9)[1]
    with pytest.raises(DataError, match="no text of at least 9 tokens"):
        windows(DataConfig(test_data_path=(written(tmp_path / "b", [5], 0),)), 4)
