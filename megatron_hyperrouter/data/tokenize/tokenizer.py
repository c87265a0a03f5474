"""Tokenizers behind one small class: bytes, a Hugging Face ``tokenizer.json``, or ids alone.

Legend: ``V`` token ids of the vocabulary.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_hyperrouter.data.text.corpus import SAFE_CUT
from megatron_hyperrouter.errors import ConfigError, DataError, HostError, Problem

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

END_OF_TEXT = "<|endoftext|>"
_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "[SEP]")  # in order of preference
_SAFE_CUT = re.compile(SAFE_CUT)
_PIECE = 1 << 15  # characters encoded at a time: the backend takes about 100 bytes of memory for each
_GROUP = 8  # pieces in one call


class Tokenizer(ABC):
    """Text to token ids and back.

    ``vocab_size``: ids are below it.  ``eod``: the id that ends a document.
    """

    vocab_size: int

    @property
    @abstractmethod
    def eod(self) -> int:
        """The id of the end of a document; DataError where the tokenizer has none."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The ids of each text, without special tokens of its own; the arrays may be read-only."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD."""

    @abstractmethod
    def token_bytes_V(self) -> NDArray[np.int32] | None:
        """UTF-8 bytes that each id stands for, 0 for special ids; None where bytes cannot be told by the id
        alone.
        """

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return [int(token) for token in self.encode_batch([text])[0]]


class ByteTokenizer(Tokenizer):
    """Id = byte value of the UTF-8 text; 256 ends a document."""

    vocab_size = 257

    @property
    def eod(self) -> int:
        """256."""
        return 256

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The UTF-8 bytes of each text."""
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the bytes; 256 shows as ``<|endoftext|>``."""
        pieces, run = [], bytearray()
        for token in ids:
            if token != self.eod:
                run.append(token)
                continue
            pieces.append(run.decode(errors="replace") + END_OF_TEXT)
            run = bytearray()
        return "".join(pieces) + run.decode(errors="replace")

    def token_bytes_V(self) -> NDArray[np.int32]:
        """One each; 0 for 256."""
        return np.array([1] * 256 + [0], dtype=np.int32)


class NullTokenizer(Tokenizer):
    """Ids without text, for data that was tokenized elsewhere; the last id ends a document."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    @property
    def eod(self) -> int:
        """The last id."""
        return self.vocab_size - 1

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """ConfigError: there is no text."""
        raise _no_text("encode")

    def decode(self, ids: Iterable[int]) -> str:
        """ConfigError: there is no text."""
        raise _no_text("decode")

    def token_bytes_V(self) -> None:
        """None: there is no text."""
        return


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the library ``tokenizers``: that file, or a folder that holds it.

    Special tokens that stand in a text as text (a literal ``<|endoftext|>``) become their id, as everywhere
    with this format.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._backend = _load(path)
        vocab = self._backend.get_vocab(with_added_tokens=True)
        if not vocab:
            raise DataError(
                f"{path}: the tokenizer has no tokens",
                remedy="train it: python tools/train_tokenizer.py --help",
            )
        self.vocab_size = max(vocab.values()) + 1
        self._cuts_exactly = _cuts_exactly(self._backend)

    @cached_property
    def _eod(self) -> int:
        for name in _END_TOKENS:
            token = self._backend.token_to_id(name)
            if token is not None:
                return int(token)
        raise DataError(
            f"{self.path}: the tokenizer has no token that ends a document (looked for "
            f"{', '.join(_END_TOKENS)})",
            remedy=f"add {END_OF_TEXT} as a special token, or leave out --append-eod",
        )

    @property
    def eod(self) -> int:
        """The id of the first of the usual end tokens that is there; DataError where none is."""
        return self._eod

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """As the base class says."""
        if not self._cuts_exactly:
            return [ids for text in texts for ids in self._encode([text])]
        pieces_of = [list(_pieces(text)) for text in texts]
        flat = [piece for pieces in pieces_of for piece in pieces]
        encoded = iter(
            [
                ids
                for start in range(0, len(flat), _GROUP)
                for ids in self._encode(flat[start : start + _GROUP])
            ]
        )
        return [_joined([next(encoded) for _ in pieces]) for pieces in pieces_of]

    def _encode(self, pieces: list[str]) -> list[NDArray[np.int32]]:
        return [
            np.array(found.ids, dtype=np.int32)
            for found in self._backend.encode_batch_fast(pieces, add_special_tokens=False)
        ]

    def json(self) -> str:
        """The ``tokenizer.json`` as the library writes it, with truncation and padding off."""
        return str(self._backend.to_str())

    def decode(self, ids: Iterable[int]) -> str:
        """The text, special tokens included."""
        return str(self._backend.decode([int(token) for token in ids], skip_special_tokens=False))

    def token_bytes_V(self) -> NDArray[np.int32] | None:
        """As the base class says; None where the tokenizer is not byte-level.

        A byte-level vocabulary writes each byte as one character, so a token has as many bytes as characters.
        Text that a normalizer changes counts as changed.
        """
        added = self._backend.get_added_tokens_decoder()
        vocab = self._backend.get_vocab(with_added_tokens=True)
        alphabet = _byte_alphabet(self._backend)
        if alphabet is None or any(
            not alphabet.issuperset(name) for name, token in vocab.items() if token not in added
        ):
            return None
        bytes_V = np.zeros(self.vocab_size, dtype=np.int32)
        for name, token in vocab.items():
            if token not in added:
                bytes_V[token] = len(name)
            elif not added[token].special:
                bytes_V[token] = len(added[token].content.encode())
        return bytes_V


def build_tokenizer(
    tokenizer_type: str, tokenizer_model: str | None = None, vocab_size: int | None = None
) -> Tokenizer:
    """The tokenizer of that type.

    ``tokenizer_model``: file or folder, HuggingFaceTokenizer only.  ``vocab_size``: NullTokenizer only.
    Raises ConfigError (a type that is unknown, or lacks what it needs), DataError (an unreadable file),
    HostError (no library).
    """
    if tokenizer_type == "ByteTokenizer":
        return ByteTokenizer()
    if tokenizer_type == "HuggingFaceTokenizer":
        if not tokenizer_model:
            raise ConfigError(
                [
                    Problem(
                        "--tokenizer-model",
                        tokenizer_model,
                        "must be given with HuggingFaceTokenizer",
                        "name a tokenizer.json",
                    )
                ]
            )
        return HuggingFaceTokenizer(tokenizer_model)
    if tokenizer_type == "NullTokenizer":
        if vocab_size is None or vocab_size < 1:
            raise ConfigError(
                [
                    Problem(
                        "--vocab-size",
                        vocab_size,
                        "must be given with NullTokenizer",
                        "give the number of token ids",
                    )
                ]
            )
        return NullTokenizer(vocab_size)
    known = "ByteTokenizer, HuggingFaceTokenizer or NullTokenizer"
    raise ConfigError(
        [Problem("--tokenizer-type", tokenizer_type, "is not a tokenizer type", f"use {known}")]
    )


def _no_text(verb: str) -> ConfigError:
    remedy = "use ByteTokenizer or HuggingFaceTokenizer"
    return ConfigError(
        [Problem("--tokenizer-type", "NullTokenizer", f"has ids alone and cannot {verb} text", remedy)]
    )


def _load(path: str) -> Backend:
    """The backend of a file or folder, with truncation and padding off: a corpus keeps every token."""
    try:
        from tokenizers import Tokenizer as Loader
    except ImportError as error:
        raise HostError(
            "HuggingFaceTokenizer needs the library tokenizers", remedy="bash tools/setup_env.sh"
        ) from error
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    remedy = (
        "--tokenizer-model names a tokenizer.json, or a folder that holds one; "
        "tools/train_tokenizer.py makes one"
    )
    if not file.is_file():
        raise DataError(f"{file}: no such tokenizer file", remedy=remedy)
    try:
        backend = Loader.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"{file}: not a tokenizer of the library tokenizers: {error}", remedy=remedy
        ) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _cuts_exactly(backend: Backend) -> bool:
    """Whether a text may be encoded in pieces with the ids of the whole: sure for GPT-2's words and plain
    added tokens alone.
    """
    tree = json.loads(backend.to_str())
    words = tree["pre_tokenizer"] or {}
    gpt2 = words.get("type") == "ByteLevel" and words.get("use_regex", True) and not words["add_prefix_space"]
    plain = all(
        "\n" not in token["content"] and not token["lstrip"] and not token["rstrip"]
        for token in tree["added_tokens"]
    )
    return bool(gpt2 and plain and tree["normalizer"] is None)


def _pieces(text: str) -> Iterator[str]:
    """Cut ``text`` where that is safe, into pieces of about ``_PIECE`` characters, or longer where there is
    no safe place.
    """
    start = 0
    while len(text) - start > _PIECE:
        cut = _SAFE_CUT.search(text, start + _PIECE)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _joined(parts: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _byte_alphabet(backend: Backend) -> frozenset[str] | None:
    """The 256 characters that stand for bytes, or None where the tokenizer is not byte-level."""
    from tokenizers.pre_tokenizers import ByteLevel

    tree = json.loads(backend.to_str())
    marked = tree["model"].get("end_of_word_suffix") or tree["model"].get("continuing_subword_prefix")
    if marked or not (_has_byte_level(tree["pre_tokenizer"]) or _has_byte_level(tree["normalizer"])):
        return None
    return frozenset(ByteLevel.alphabet())


def _has_byte_level(part: dict[str, Any] | None) -> bool:
    if part is None:
        return False
    if part["type"] == "ByteLevel":
        return True
    return any(
        _has_byte_level(step) for name in ("pretokenizers", "normalizers") for step in part.get(name, ())
    )
