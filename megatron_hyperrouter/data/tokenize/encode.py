"""Batches of text to tokens, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np
from numpy.typing import NDArray

from megatron_hyperrouter.data.store.token_files import smallest_dtype
from megatron_hyperrouter.data.text.corpus import BadText, TextBatch, documents
from megatron_hyperrouter.data.tokenize.backends import Backend, build_encoder
from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer, TokenizerOptions
from megatron_hyperrouter.errors import DataError, HyperRouterError

_BATCHES_PER_WORKER = 3  # one in work, one waiting for the worker, one waiting for the writer


@dataclass(frozen=True)
class EncodeSettings:
    """How text becomes tokens: everything that a worker process needs to know."""

    tokenizer: TokenizerOptions
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    backend: str = "auto"  # one of backends.BACKENDS; changes no byte of the output
    on_bad_line: str = "stop"  # or "skip": leave out lines that cannot be used


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of a batch under one key: sequences end to end, the length of each, and how many each
    document has.
    """

    tokens: NDArray[np.integer]
    lengths: NDArray[np.int32]
    sequences: NDArray[np.int32]
    words: int


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """The tokens of a batch under each key, how many lines were left out, and the message about the first."""

    columns: list[Encoded]
    left_out: int = 0
    first_left_out: str = ""


class Encoder:
    """Turns batches of undecoded text into tokens; one in each process."""

    def __init__(self, settings: EncodeSettings, tokenizer: Tokenizer | None = None) -> None:
        """``tokenizer``: the one of the settings, where it is loaded already."""
        self.settings = settings
        self.tokenizer = tokenizer or build_encoder(settings.tokenizer, cast(Backend, settings.backend))
        self._eod = np.array([self.tokenizer.eod], dtype=np.int32) if settings.append_eod else None
        self.dtype = smallest_dtype(self.tokenizer.vocab_size)

    def __call__(self, batch: TextBatch) -> EncodedBatch:
        """The tokens under each key; BadLine for a line that cannot be used, where such lines are not
        skipped, BadText for a text that the tokenizer cannot encode.
        """
        bad: list[str] = []
        skip = self.settings.on_bad_line == "skip"
        found = list(documents(batch, self.settings.keys, bad if skip else None))
        try:
            columns = [
                self._encode([document[column] for document in found], batch.closes)
                for column in range(len(self.settings.keys))
            ]
        except BadText as error:
            raise BadText(f"{batch}: {error.message}", remedy=error.remedy) from error
        return EncodedBatch(columns, len(bad), bad[0] if bad else "")

    def _encode(self, found: list[list[str]], closes: bool) -> Encoded:
        texts = [text for sequences in found for text in sequences]
        encoded = iter(self.tokenizer.encode_batch(texts))
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
        if tokens.size and int(tokens.max()) >= self.tokenizer.vocab_size:
            raise DataError(
                (
                    f"the tokenizer gave id {tokens.max()}, which is outside its vocabulary "
                    f"of {self.tokenizer.vocab_size} ids"
                ),
                remedy="train or download the tokenizer again; its file is inconsistent",
            )
        return Encoded(
            tokens.astype(self.dtype),
            np.array(lengths, dtype=np.int32),
            np.array(counts, dtype=np.int32),
            count_words(texts),
        )


def count_words(texts: Iterable[str]) -> int:
    """How many words the texts have, between ASCII white space: what per-word perplexity needs."""
    letters = np.frombuffer("\n".join(("", *texts, "")).encode(), np.uint8)
    space = (letters - np.uint8(9) < 5) | (letters == 32)  # 9 to 13 are tab, line end and similar
    return int(np.count_nonzero(space[:-1] > space[1:]))


def encode_all(
    batches: Iterator[TextBatch], encoder: Encoder, workers: int
) -> Iterator[tuple[TextBatch, EncodedBatch]]:
    """Each batch with its tokens, in the order of the batches; ``workers``: processes that encode, 1 encodes
    in this one.
    """
    if workers == 1:
        for batch in batches:
            yield batch, encoder(batch)
        return
    # forking a process that has threads (progress, tokenizers) can hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    under_way: deque[tuple[TextBatch, Future[EncodedBatch]]] = deque()
    try:
        for batch in batches:
            under_way.append((batch, _submit(pool, encoder.settings, batch)))
            if len(under_way) >= _BATCHES_PER_WORKER * workers:
                done, future = under_way.popleft()
                yield done, future.result()
        for done, future in under_way:
            yield done, future.result()
    except BrokenProcessPool as error:
        raise HyperRouterError(
            "a worker process was killed or ran out of memory",
            remedy="use fewer --workers, or free up memory",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=1)
def _encoder(settings: EncodeSettings) -> Encoder:
    """The encoder of this worker: loading a tokenizer for each batch would cost more than encoding it."""
    return Encoder(settings)


def _submit(pool: ProcessPoolExecutor, settings: EncodeSettings, batch: TextBatch) -> Future[EncodedBatch]:
    """Queue a batch; a worker that this starts inherits a blocked SIGINT: Ctrl-C is for the parent, who
    cleans up.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_encode, settings, batch)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _encode(settings: EncodeSettings, batch: TextBatch) -> EncodedBatch:
    return _encoder(settings)(batch)


def _start_worker() -> None:
    """Use one thread, and exit when the parent has died (kill -9), because nothing else would end this
    process.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
