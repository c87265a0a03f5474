"""Text files to token files: read, encode in worker processes, write in order.

Memory is bounded: a few batches are under way at a time, and the results of a batch are written before the next is read.  What is
written depends on the inputs and the tokenizer alone, not on the number of workers.  Documents are Megatron-LM's: an empty text is an
empty document, and the end-of-document token joins the last sequence of a document that holds any token.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from megatron_hyperrouter.data.backends import Backend, build_encoder, choose_backend
from megatron_hyperrouter.data.corpus import Batch, documents, read_batches, total_bytes
from megatron_hyperrouter.data.store import IndexedWriter, smallest_dtype
from megatron_hyperrouter.errors import ConfigError, DataError, HyperRouterError, Problem

_CHECKED_CHARACTERS = 1 << 18  # of the first documents are encoded by two back ends, and compared
_BATCHES_PER_WORKER = 3  # one in work, one waiting for the worker, one waiting for the writer


@dataclass(frozen=True)
class Recipe:
    """How text becomes tokens: all that a worker must know."""

    tokenizer_type: str
    tokenizer_model: str | None = None
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    backend: str = "auto"  # one of backends.BACKENDS; changes no byte of the output


@dataclass(frozen=True)
class Written:
    """One finished pair of files."""

    prefix: str
    documents: int
    sequences: int
    tokens: int
    dtype: np.dtype[Any]


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of a batch under one key: sequences end to end, the length of each, and how many each document has."""

    tokens: NDArray[np.integer]
    lengths: NDArray[np.int32]
    sequences: NDArray[np.int32]


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    recipe: Recipe,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> list[Written]:
    """Write ``{output_prefix}_{key}_document.bin/.idx`` for each key of the recipe, under temporary names until all is done.

    ``workers``: processes that encode; 1 encodes in this one.  ``progress(bytes done, all bytes)`` of the inputs on disk.
    ``report``: told which back end encodes, and why not a faster one.
    Raises DataError (file, and line or byte, of bad input), ConfigError, HostError; nothing is left in place then, nor when a
    signal interrupts.
    """
    _check(recipe, workers)
    size = total_bytes(inputs)
    recipe = with_backend(recipe, inputs, report)
    encoder = Encoder(recipe)
    with ExitStack() as stack:
        prefixes = [f"{output_prefix}_{key}_document" for key in recipe.keys]
        writers = [_Writer(prefix, encoder.dtype) for prefix in prefixes]
        for writer in writers:
            stack.callback(writer.abort)  # harmless once the writer is closed
        for batch, results in _encode_all(read_batches(inputs), encoder, workers):
            for writer, encoded in zip(writers, results, strict=True):
                writer.add(encoded, batch.closes)
            if progress:
                progress(batch.position, size)
        for key, writer in zip(recipe.keys, writers, strict=True):
            _check_not_empty(writer, key, inputs)
        for writer in writers:
            writer.close()
        return [Written(w.prefix, w.num_documents, w.num_sequences, w.num_tokens, w.dtype) for w in writers]


def with_backend(recipe: Recipe, inputs: Sequence[str], report: Callable[[str], None] | None = None) -> Recipe:
    """The recipe with the back end that encodes, after a check on the first documents; as :func:`choose_backend`."""
    backend = choose_backend(recipe.tokenizer_type, recipe.tokenizer_model, recipe.backend, _first_documents(inputs, recipe.keys), report)
    return replace(recipe, backend=backend)


def _first_documents(inputs: Sequence[str], keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and texts of the first documents: those of the first batch."""
    batch = next(read_batches(inputs), None)
    if batch is None:
        return
    size = 0
    for number, document in enumerate(documents(batch, keys), start=1):
        for key, sequences in zip(keys, document, strict=True):
            for text in sequences:
                yield f"{batch.path}, document {number}, key {key!r}", text
                size += len(text)
        if size > _CHECKED_CHARACTERS:
            return


class Encoder:
    """Batches of undecoded text to tokens; one in each process."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._tokenizer = build_encoder(recipe.tokenizer_type, recipe.tokenizer_model, cast(Backend, recipe.backend))
        self._eod = np.array([self._tokenizer.eod], dtype=np.int32) if recipe.append_eod else None
        self.dtype = smallest_dtype(self._tokenizer.vocab_size)

    def __call__(self, batch: Batch) -> list[Encoded]:
        """One result for each key; DataError for bad input."""
        found = list(documents(batch, self.recipe.keys))
        return [self._encode([document[column] for document in found], batch.closes) for column in range(len(self.recipe.keys))]

    def _encode(self, found: list[list[str]], closes: bool) -> Encoded:
        encoded = iter(self._tokenizer.encode_batch([text for sequences in found for text in sequences]))
        parts: list[NDArray[np.int32]] = []
        lengths: list[int] = []
        counts: list[int] = []
        for sequences in found:
            before = len(lengths)
            for _ in sequences:
                tokens = next(encoded)
                if tokens.size:
                    parts.append(tokens)
                    lengths.append(tokens.size)
            if self._eod is not None and closes and len(lengths) > before:
                parts.append(self._eod)
                lengths[-1] += 1
            counts.append(len(lengths) - before)
        tokens = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        if tokens.size and int(tokens.max()) >= self._tokenizer.vocab_size:
            raise DataError(
                f"the tokenizer made id {tokens.max()}, beyond its vocabulary of {self._tokenizer.vocab_size}",
                remedy="its file is inconsistent: train or fetch it again",
            )
        return Encoded(tokens.astype(self.dtype), np.array(lengths, dtype=np.int32), np.array(counts, dtype=np.int32))


class _Writer(IndexedWriter):
    """A writer that takes whole batches, and a plain-text document piece by piece."""

    _open_sequences = 0  # sequences so far of the document that is not yet complete

    def add(self, encoded: Encoded, closes: bool) -> None:
        """Append the documents of a batch; ``closes`` false: the last of them goes on in the next batch."""
        if closes and not self._open_sequences and (encoded.sequences == 1).all():
            self.add_documents(encoded.tokens, encoded.lengths)
            return
        self._append(self._as_tokens(encoded.tokens), *self._checked_lengths(encoded.lengths, encoded.tokens.size))
        for number, count in enumerate(encoded.sequences.tolist(), start=1):
            self._open_sequences += count
            if closes or number < len(encoded.sequences):
                self._mark_documents(1, self._open_sequences)
                self._open_sequences = 0


def _check(recipe: Recipe, workers: int) -> None:
    problems = []
    if workers < 1:
        problems.append(Problem("--workers", workers, "must be at least 1", "use as many as there are processor cores"))
    if not recipe.keys or len(set(recipe.keys)) < len(recipe.keys):
        problems.append(Problem("--json-keys", " ".join(recipe.keys), "must name each key once", "leave out the repeated key"))
    if problems:
        raise ConfigError(problems)


def _check_not_empty(writer: IndexedWriter, key: str, inputs: Sequence[str]) -> None:
    names = ", ".join(inputs)
    if not writer.num_documents:
        raise DataError(f"{names}: no documents", remedy='give JSON lines {"text": "..."}, or plain text that is not empty')
    if not writer.num_tokens:
        raise DataError(
            f"{names}: {writer.num_documents} documents, and each is empty under the key {key!r}",
            remedy="name another key: --json-keys KEY",
        )


def _encode_all(batches: Iterator[Batch], encoder: Encoder, workers: int) -> Iterator[tuple[Batch, list[Encoded]]]:
    """Each batch with its tokens, in the order of the batches."""
    if workers == 1:
        for batch in batches:
            yield batch, encoder(batch)
        return
    context = multiprocessing.get_context("spawn")  # forking a process that has threads (progress, tokenizers) can hang
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    under_way: deque[tuple[Batch, Future[list[Encoded]]]] = deque()
    try:
        for batch in batches:
            under_way.append((batch, _submit(pool, encoder.recipe, batch)))
            if len(under_way) >= _BATCHES_PER_WORKER * workers:
                done, future = under_way.popleft()
                yield done, future.result()
        for done, future in under_way:
            yield done, future.result()
    except BrokenProcessPool as error:
        raise HyperRouterError("a worker process died, killed or out of memory", remedy="use fewer --workers, or free memory") from error
    finally:
        pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=1)
def _encoder(recipe: Recipe) -> Encoder:
    """The encoder of this worker: loading a tokenizer for each batch would cost more than encoding it."""
    return Encoder(recipe)


def _submit(pool: ProcessPoolExecutor, recipe: Recipe, batch: Batch) -> Future[list[Encoded]]:
    """Queue a batch; a worker that this starts inherits a blocked SIGINT: Ctrl-C is for the parent, who cleans up."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_encode, recipe, batch)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _encode(recipe: Recipe, batch: Batch) -> list[Encoded]:
    return _encoder(recipe)(batch)


def _start_worker() -> None:
    """Leave parallelism to the parent, and end when it has died (kill -9), for no one else would end this process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
