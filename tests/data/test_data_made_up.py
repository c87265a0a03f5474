"""``--mock-data``: the same tokens everywhere, learnable, and a dataset like any other."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from megatron_hyperrouter.config.schedules.batch_sizes import BatchSizes
from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.order.index_files import IndexCache
from megatron_hyperrouter.data.store.made_up import PREFIX, MadeUpTokens
from megatron_hyperrouter.data.stream.dataset import Builder, Splits
from megatron_hyperrouter.data.stream.mix_schedule import mixes_of
from megatron_hyperrouter.data.stream.segments import TrainingSamples, splits_of_run


@pytest.mark.parametrize(("vocab_size", "eod"), [(257, 256), (100, 0), (70_000, None), (2, 1)])
def test_every_id_is_of_the_vocabulary_and_documents_end(vocab_size: int, eod: int | None) -> None:
    data = MadeUpTokens(vocab_size, eod)
    end = vocab_size - 1 if eod is None else eod
    assert data.tokens.min() >= 0 and data.tokens.max() < vocab_size
    last = (data.pointers + data.sizes.astype(np.int64) * data.dtype.itemsize) // data.dtype.itemsize - 1
    assert (data.tokens[last] == end).all()
    assert int((data.tokens == end).sum()) == len(data), "the end of a document is nowhere else"
    np.testing.assert_array_equal(MadeUpTokens(vocab_size, eod).tokens, data.tokens)


def test_the_best_model_reaches_ln_3() -> None:
    """Counted: how the id grows from one token to the next, inside documents."""
    tokens = MadeUpTokens(1000, 999).tokens.astype(np.int64)
    inside = (tokens[:-1] != 999) & (tokens[1:] != 999)
    grown = ((tokens[1:] - tokens[:-1]) % 999)[inside]
    counts = np.bincount(grown, minlength=4)
    shares = counts[1:4] / counts.sum()
    assert counts[0] == 0 and counts[4:].sum() == 0
    assert -(shares * np.log(shares)).sum() == pytest.approx(math.log(3), abs=1e-5)


def opened(step: int, ledger: list, cache: Path, **how: object) -> Splits:
    data = DataConfig(mock_data=True, **how)
    builder = Builder(data, 32, 5, 257, IndexCache(str(cache), cached_from=1), eod=256)
    sizes = {"train_iters": 8, "sizes": BatchSizes(4), "valid_samples": 6, "test_samples": 6}
    return splits_of_run(builder, mixes_of(data), ledger, step=step, **sizes)


@pytest.mark.parametrize(
    "how", [{}, {"pack_documents": True, "eod_mask_loss": True, "reset_attention_mask": True}]
)
def test_a_resumed_run_reads_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict) -> None:
    monkeypatch.chdir(tmp_path)
    whole = opened(0, [], tmp_path / "a", **how)
    assert isinstance(whole.train, TrainingSamples)
    ledger = whole.train.ledger(3)
    assert ledger[0]["mix"] == [PREFIX]
    resumed = opened(3, ledger, tmp_path / "b", **how)
    for i in range(12, 32):
        np.testing.assert_array_equal(resumed.train[i], whole.train[i])
    for split in (whole.valid, whole.test):
        assert split is not None and len(split) >= 6 and split[0].max() < 257
    assert not (tmp_path / "cache").exists(), "nothing is written beside data that do not exist"
