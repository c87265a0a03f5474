"""Batches for one data-parallel rank; their samples are a function of the global step, so a resumed run
continues exactly.

``B`` samples of a micro-batch, ``S`` tokens of a sequence.  With R data ranks, micro-batch m of a step on
rank r has samples first + (m * R + r) * B + [0, B), where ``first`` is the number of samples in all steps
before it.

Threads read ahead, not processes: a sample is one call into C++ that lets other threads run.  Threads are
fast enough for any training step, start at once, share the index, are not killed by signals that a
launcher sends to every process, and pass on errors unchanged.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from megatron_hyperrouter.config.schedules.batch_sizes import BatchSizes
from megatron_hyperrouter.data.stream.dataset import Dataset
from megatron_hyperrouter.errors import DataError

_AHEAD = 4  # micro-batches that each worker reads ahead


class Batches(Iterator[tuple[Tensor, Tensor]]):
    """This rank's ``(tokens_BS, labels_BS)``, int64, contiguous, for ``num_steps`` steps from
    ``start_step`` on; close it when done.

    ``num_workers``: threads that read ahead; 0: each batch is read when it is needed.  No earlier sample
    is read. ``rampup``: see :class:`BatchSizes`.  ``waited``: total seconds that the caller has waited for
    batches.  ``pin``: in page-locked memory, from which a GPU copies while it computes; None: if there is
    a GPU.  Raises ValueError for sizes that do not divide, DataError for a dataset that ends too soon, and
    what reading a sample raises.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        data_rank: int,
        data_size: int,
        start_step: int,
        num_steps: int,
        num_workers: int,
        rampup: Sequence[int] | None = None,
        pin: bool | None = None,
    ) -> None:
        together = micro_batch_size * data_size
        if (
            micro_batch_size < 1
            or data_size < 1
            or global_batch_size < together
            or global_batch_size % together
        ):
            raise ValueError(f"{global_batch_size=} must be a multiple of {micro_batch_size=} x {data_size=}")
        if not 0 <= data_rank < data_size or start_step < 0 or num_steps < 0 or num_workers < 0:
            raise ValueError(
                f"{data_rank=} must be less than {data_size=}; {start_step=}, {num_steps=} and "
                f"{num_workers=} must be at least 0"
            )
        sizes = BatchSizes(global_batch_size, rampup)
        begin, needed = sizes.samples(start_step), sizes.samples(start_step + num_steps)
        if num_steps and needed > len(dataset):
            message = (
                f"the dataset has {len(dataset)} samples, but training from step 0 to step "
                f"{start_step + num_steps} needs {needed}"
            )
            raise DataError(
                message, remedy="use more text, or a smaller --train-iters or --global-batch-size"
            )
        self.waited = 0.0
        self._dataset, self._batch_size, self._pin = (
            dataset,
            micro_batch_size,
            torch.cuda.is_available() if pin is None else pin,
        )
        self._starts = iter(range(begin + data_rank * micro_batch_size, needed, together))
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="read-ahead") if num_workers else None
        self._ahead: deque[Future[tuple[Tensor, Tensor]]] = deque()
        for _ in range(num_workers * _AHEAD):
            self._read_ahead()

    def __next__(self) -> tuple[Tensor, Tensor]:
        asked = time.perf_counter()
        try:
            return self._next()
        finally:
            self.waited += time.perf_counter() - asked

    def _next(self) -> tuple[Tensor, Tensor]:
        if self._pool is None:
            return self._read(next(self._starts))
        if not self._ahead:
            raise StopIteration
        batch = self._ahead.popleft().result()
        self._read_ahead()
        return batch

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead; no batches come afterwards."""
        self._starts = iter(range(0))
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _read_ahead(self) -> None:
        start = next(self._starts, None)
        if start is not None and self._pool is not None:
            self._ahead.append(self._pool.submit(self._read, start))

    def _read(self, start: int) -> tuple[Tensor, Tensor]:
        samples = [self._dataset[i] for i in range(start, start + self._batch_size)]
        shape = (len(samples), len(samples[0]) - 1)
        # PyTorch keeps page-locked memory and hands it out again once the copies from it are done: no call of
        # the driver for each batch.
        tokens_BS, labels_BS = (torch.empty(shape, dtype=torch.int64, pin_memory=self._pin) for _ in range(2))
        for into, first in ((tokens_BS.numpy(), 0), (labels_BS.numpy(), 1)):
            for row, sample in enumerate(samples):
                into[row] = sample[first : first + shape[1]]
        return tokens_BS, labels_BS
