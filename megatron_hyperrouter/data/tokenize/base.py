"""The interface of all tokenizers, and the two that need no library: bytes, and ids without text.

Legend: ``V`` token ids of the vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_hyperrouter.errors import ConfigError, DataError, Problem

END_OF_TEXT = "<|endoftext|>"
# a larger id means a damaged file: tables with one entry for each id would fill the memory
MOST_IDS = 1 << 24


class Tokenizer(ABC):
    """Text to token ids and back.

    ``vocab_size``: every id is below it.  ``eod``: the id that ends a document.
    """

    type: ClassVar[str]  # the name that --tokenizer-type takes
    vocab_size: int

    @property
    @abstractmethod
    def eod(self) -> int:
        """The id that ends a document.  DataError if the tokenizer has none."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The ids of each text, without a token for its start or end.  The arrays may be read-only."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``.  Bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def token_bytes_V(self) -> NDArray[np.int32] | None:
        """The number of UTF-8 bytes of each id; 0 for special ids.

        None if the id alone does not determine its bytes.
        """

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return [int(token) for token in self.encode_batch([text])[0]]

    def identity(self) -> dict[str, Any]:
        """What distinguishes this tokenizer from others: its type, its vocabulary size and the SHA-256 of its
        files.
        """
        return {"type": self.type, "sha256": self.sha256(), "vocab_size": self.vocab_size}

    def sha256(self) -> str | None:
        """The SHA-256 of the tokenizer's file, or None if it has no file."""
        return None


class ByteTokenizer(Tokenizer):
    """Each id is a byte of the UTF-8 text; 256 ends a document."""

    type = "ByteTokenizer"
    vocab_size = 257

    @property
    def eod(self) -> int:
        """256."""
        return 256

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The UTF-8 bytes of each text."""
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the bytes; 256 is shown as ``<|endoftext|>``."""
        parts, run = [], bytearray()
        for token in ids:
            if token != self.eod:
                run.append(token)
                continue
            parts.append(run.decode(errors="replace") + END_OF_TEXT)
            run = bytearray()
        return "".join(parts) + run.decode(errors="replace")

    def token_bytes_V(self) -> NDArray[np.int32]:
        """One byte each; 0 for 256."""
        return np.array([1] * 256 + [0], dtype=np.int32)


class NullTokenizer(Tokenizer):
    """Ids without text, for data that another program tokenized.

    As in Megatron-LM, ``num_ids`` does not count the end of a document: it is the id after the last of them.
    """

    type = "NullTokenizer"

    def __init__(self, num_ids: int) -> None:
        self._num_ids = num_ids
        self.vocab_size = num_ids + 1

    @property
    def eod(self) -> int:
        """The id after the last one of ``--vocab-size``."""
        return self._num_ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """ConfigError: there is no text."""
        raise _no_text("encode")

    def decode(self, ids: Iterable[int]) -> str:
        """ConfigError: there is no text."""
        raise _no_text("decode")

    def token_bytes_V(self) -> None:
        """None: there is no text."""
        return


def no_end_token(path: str, name: str | None, known: Iterable[str] = ()) -> DataError:
    """What to raise for ``--eod-token NAME`` that the vocabulary lacks, or where no end token was found
    (None).
    """
    if name is None:
        looked_for = f" (looked for {', '.join(known)})" if known else ""
        message = f"{path}: this tokenizer has no known end-of-document token{looked_for}"
        return DataError(message, remedy="give the token with --eod-token TOKEN, or leave out --append-eod")
    listed = ", ".join(known)
    suggestion = (
        (f"choose one of the special tokens of the tokenizer: {listed}")
        if listed
        else "choose a token that the vocabulary contains"
    )
    return DataError(f"{path}: --eod-token {name} is not in the vocabulary", remedy=suggestion)


def _no_text(verb: str) -> ConfigError:
    remedy = "use a tokenizer for text, such as ByteTokenizer or HuggingFaceTokenizer"
    return ConfigError(
        [
            Problem(
                "--tokenizer-type",
                "NullTokenizer",
                (f"cannot {verb} text, because it knows only token ids"),
                remedy,
            )
        ]
    )
