"""Batches depend only on the step, for any rank, first step and number of workers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
from corpora import write_corpus
from hypothesis import given
from hypothesis import strategies as st

from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.stream.dataset import build_splits
from megatron_hyperrouter.data.stream.loader import Batches
from megatron_hyperrouter.errors import DataError

SEQ_LENGTH = 6


class Numbered:
    """Sample i is i * 100 + 0 .. S; remembers what was read."""

    def __init__(self, size: int, *, bad: int | None = None) -> None:
        self.size, self.bad, self.read = size, bad, []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> np.ndarray:
        self.read.append(i)
        if i == self.bad:
            raise DataError(f"sample {i} is bad", remedy="mend it")
        return np.arange(SEQ_LENGTH + 1) + 100 * i


def batches(dataset, **other) -> Batches:
    arguments = {
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "data_rank": 0,
        "data_size": 2,
        "start_step": 0,
        "num_steps": 3,
        "num_workers": 0,
    }
    return Batches(dataset, **(arguments | other))


def numbers(tokens: torch.Tensor) -> list[int]:
    return (tokens[:, 0] // 100).tolist()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_tokens_and_labels_are_the_sample_and_itself_shifted(num_workers):
    with batches(Numbered(24), num_workers=num_workers) as stream:
        tokens, labels = next(stream)
    for tensor in (tokens, labels):
        assert tensor.dtype == torch.int64 and tensor.shape == (2, SEQ_LENGTH) and tensor.is_contiguous()
    assert tokens.tolist() == [[0, 1, 2, 3, 4, 5], [100, 101, 102, 103, 104, 105]]
    assert labels.tolist() == [[1, 2, 3, 4, 5, 6], [101, 102, 103, 104, 105, 106]]


@given(
    batch=st.integers(1, 3),
    micro_batches=st.integers(1, 3),
    data_size=st.integers(1, 3),
    start=st.integers(0, 4),
    steps=st.integers(0, 4),
    num_workers=st.sampled_from([0, 2]),
)
def test_ranks_share_out_each_global_batch(batch, micro_batches, data_size, start, steps, num_workers):
    together = batch * micro_batches * data_size
    dataset = Numbered((start + steps) * together)
    streams = [
        batches(
            dataset,
            micro_batch_size=batch,
            global_batch_size=together,
            data_rank=rank,
            data_size=data_size,
            start_step=start,
            num_steps=steps,
            num_workers=num_workers,
        )
        for rank in range(data_size)
    ]
    for step in range(start, start + steps):
        for micro_batch in range(micro_batches):
            for rank, stream in enumerate(streams):
                first = step * together + (micro_batch * data_size + rank) * batch
                assert numbers(next(stream)[0]) == list(range(first, first + batch))
    for stream in streams:
        assert next(stream, None) is None
        stream.close()
    assert sorted(dataset.read) == list(range(start * together, (start + steps) * together)), (
        "each sample once, none before the start"
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_later_start_reads_on_where_the_first_run_stopped(num_workers):
    with batches(Numbered(80), num_steps=10, num_workers=num_workers) as stream:
        whole = [tokens.tolist() for tokens, _ in stream]
    with batches(Numbered(80), start_step=7, num_steps=3, num_workers=num_workers) as stream:
        assert [tokens.tolist() for tokens, _ in stream] == whole[14:]


def test_real_data_is_the_same_with_and_without_workers(tmp_path):
    prefix = write_corpus(tmp_path / "corpus", [50, 3, 0, 70, 41] * 4)
    data = build_splits(
        DataConfig(train_data_path=(prefix,)),
        seq_length=8,
        seed=1,
        vocab_size=1000,
        train_samples=160,
        valid_samples=0,
        test_samples=0,
    ).train
    read = []
    for num_workers in (0, 1, 4):
        with batches(data, num_steps=20, num_workers=num_workers) as stream:
            read.append(torch.stack([torch.stack(batch) for batch in stream]))
    assert read[0].shape == (40, 2, 2, 8)
    assert torch.equal(read[0], read[1]) and torch.equal(read[0], read[2])
    for tokens, labels in read[0]:
        assert torch.equal(tokens[:, 1:], labels[:, :-1])


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_an_error_arrives_as_it_is_and_in_its_place(num_workers):
    with batches(Numbered(24, bad=9), num_workers=num_workers) as stream:
        assert [numbers(next(stream)[0]) for _ in range(2)] == [[0, 1], [4, 5]]
        with pytest.raises(DataError) as caught:
            next(stream)
    assert type(caught.value) is DataError
    assert (caught.value.message, caught.value.remedy) == ("sample 9 is bad", "mend it")
    assert not threads()


def test_workers_read_ahead_but_not_without_end():
    dataset = Numbered(8000)
    with batches(dataset, num_steps=1000, num_workers=2) as stream:
        next(stream)
        deadline = time.monotonic() + 10
        while len(dataset.read) < 18 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert 18 <= len(dataset.read) <= 2 * (1 + 8), "4 batches of 2 samples in hand for each of 2 workers"
    (told,) = [each.type for each in fields(DataConfig) if each.name == "num_workers"]
    assert "prefetches 4 micro-batches" in told


def test_workers_read_at_the_same_time():
    class Meeting(Numbered):
        """A sample is there only once another one is being read, too."""

        meeting = threading.Barrier(2)

        def __getitem__(self, i: int) -> np.ndarray:
            self.meeting.wait(timeout=30)
            return super().__getitem__(i)

    with batches(Meeting(24), micro_batch_size=1, num_workers=2) as stream:
        assert len(list(stream)) == 12


class Slow(Numbered):
    """A sample takes 20 ms to read."""

    def __getitem__(self, i: int) -> np.ndarray:
        time.sleep(0.02)
        return super().__getitem__(i)


def test_the_wait_for_a_batch_is_counted():
    with batches(Slow(24), num_workers=0) as stream:
        assert stream.waited == 0
        next(stream)
        assert 0.04 <= stream.waited < 1
        before = stream.waited
        time.sleep(0.1)
        assert stream.waited == before, "the time between batches is the reader's own"


def test_a_training_step_longer_than_reading_never_waits():
    with batches(Slow(80), num_steps=10, num_workers=2) as stream:
        next(stream)
        before = stream.waited
        for _ in range(10):
            time.sleep(0.15)  # a step; its two samples take two threads 20 ms each
            next(stream)
        assert stream.waited - before < 0.05


def test_batches_are_page_locked_where_a_gpu_copies_from_them(monkeypatch):
    asked, empty = [], torch.empty

    def recording(*shape, pin_memory, **how):
        asked.append(pin_memory)
        return empty(*shape, **how)

    monkeypatch.setattr(torch, "empty", recording)
    for has_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        with batches(Numbered(24)) as stream:
            assert numbers(next(stream)[0]) == [0, 1]
    assert asked == [False, False, True, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_page_locked_batches_reach_the_gpu_whole():
    with batches(Numbered(2400), num_steps=300, num_workers=2) as stream:
        for number, (tokens, labels) in enumerate(stream):
            assert tokens.is_pinned() and labels.is_pinned()
            assert numbers(tokens.to("cuda", non_blocking=True).cpu()) == [4 * number, 4 * number + 1]


def test_closing_ends_the_threads_and_the_batches():
    stream = batches(Numbered(8000), num_steps=1000, num_workers=3)
    next(stream)
    assert len(threads()) == 3
    stream.close()
    assert not threads()
    assert next(stream, None) is None
    stream.close()
    quiet = batches(Numbered(24))
    quiet.close()
    assert next(quiet, None) is None


def test_closing_drops_what_has_not_been_begun():
    class Gated(Numbered):
        gate = threading.Event()

        def __getitem__(self, i: int) -> np.ndarray:
            self.gate.wait(timeout=30)
            return super().__getitem__(i)

    dataset = Gated(8000)
    stream = batches(dataset, num_steps=1000, num_workers=1)
    opener = threading.Timer(0.2, dataset.gate.set)
    opener.start()
    stream.close()
    opener.join()
    assert dataset.read == [0, 1], "the batch that was being read, of 4 in hand"


@pytest.mark.processes
def test_a_program_ends_though_nobody_closed_its_batches():
    program = """
import numpy as np
from megatron_hyperrouter.data.stream.loader import Batches
class Zeros:
    def __len__(self): return 10**9
    def __getitem__(self, i): return np.zeros(9, np.int64)
stream = Batches(Zeros(), micro_batch_size=1, global_batch_size=1, data_rank=0, data_size=1,
start_step=0, num_steps=10**9, num_workers=3)
next(stream)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_a_signal_to_the_process_leaves_the_batches_alone():
    """Launchers send SIGTERM to every process of a run; readers that were processes would die before the
    last checkpoint.
    """
    got = []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append(True))
    try:
        with batches(Numbered(800), num_steps=100, num_workers=2) as stream:
            next(stream)
            os.kill(os.getpid(), signal.SIGTERM)
            assert len(list(stream)) == 199
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [True]


def test_a_dataset_that_ends_too_soon_is_refused():
    batches(Numbered(24)).close()
    with pytest.raises(DataError, match="from step 0 to step 3 needs 24") as caught:
        batches(Numbered(23))
    assert "--train-iters" in caught.value.remedy


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"global_batch_size": 6}, "global_batch_size=6"),
        ({"global_batch_size": 0}, "global_batch_size=0"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"data_size": 0}, "data_size=0"),
        ({"data_rank": 2}, "data_rank=2"),
        ({"data_rank": -1}, "data_rank=-1"),
        ({"start_step": -1}, "start_step=-1"),
        ({"num_steps": -1}, "num_steps=-1"),
        ({"num_workers": -1}, "num_workers=-1"),
    ],
)
def test_sizes_that_make_no_batches_are_refused(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        batches(Numbered(100), **wrong)
