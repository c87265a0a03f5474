"""Training of a byte-level BPE tokenizer with the library ``tokenizers``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from megatron_hyperrouter.data.text.streams import replacing
from megatron_hyperrouter.data.tokenize.tokenizer import END_OF_TEXT
from megatron_hyperrouter.errors import ConfigError, DataError, HostError, Problem

SMALLEST_VOCAB = 257  # 256 bytes and the end of a document
# the library asks for all the memory at once, and ends the process where there is too little
LARGEST_VOCAB = 1 << 24
_PATIENCE = 5.0  # seconds


def train_bpe(texts: Iterator[str], vocab_size: int, output: str) -> int:
    """Train on ``texts``, write a ``tokenizer.json`` and return the size of its vocabulary.

    Every text encodes and decodes without loss; words are split as in GPT-2.  The result depends only on
    the texts.  It has fewer than ``vocab_size`` ids if the texts contain no more pairs to merge.
    ConfigError for a size below 257 or above 2**24, DataError if there is no text.
    """
    if vocab_size < SMALLEST_VOCAB:
        rule = f"must be at least {SMALLEST_VOCAB} (256 bytes and {END_OF_TEXT})"
        raise ConfigError([Problem("--vocab-size", vocab_size, rule, f"use {SMALLEST_VOCAB} or more")])
    if vocab_size > LARGEST_VOCAB:
        raise ConfigError(
            [
                Problem(
                    "--vocab-size",
                    vocab_size,
                    f"must be at most {LARGEST_VOCAB}",
                    "use a common size, such as 50000",
                )
            ]
        )
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise HostError(
            "training a tokenizer needs the tokenizers library", remedy="run bash tools/setup_env.sh"
        ) from error
    first = next((text for text in texts if text), None)
    if first is None:
        raise DataError(
            ("there is no text to train a tokenizer on"), remedy="set --input to files that contain text"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _run_in_thread(lambda feed: backend.train_from_iterator(feed, trainer), _again(first, texts))
    with replacing(output) as stream:
        stream.write(backend.to_str(pretty=True).encode())
    return int(backend.get_vocab_size())


def _run_in_thread(train: Callable[[Iterator[str]], None], texts: Iterator[str]) -> None:
    """``train(texts)`` in another thread, because the library does not return when a signal arrives.

    If a signal raises an exception here, the process is expected to end soon: the thread gets no more texts.
    """
    stopped, fed = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    def feed() -> Iterator[str]:
        try:
            for text in texts:
                if stopped.is_set():
                    return
                yield text
        finally:
            fed.set()

    def work() -> None:
        try:
            train(feed())
        except BaseException as error:  # noqa: BLE001 - raised again below
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        stopped.set()
        fed.wait(_PATIENCE)  # a thread that asks for a text while Python ends can abort the process
        raise
    if failed:
        raise failed[0]


def _again(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest
