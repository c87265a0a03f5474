"""Tokenizers of the libraries ``sentencepiece`` and ``tiktoken``, under Megatron-LM's names."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_hyperrouter.data.store.manifest import file_sum
from megatron_hyperrouter.data.tokenize.base import MOST_IDS, Tokenizer, no_end_token
from megatron_hyperrouter.data.tokenize.huggingface import encoding
from megatron_hyperrouter.errors import ConfigError, DataError, HostError, Problem

_SPACE = "▁"  # how a piece writes a space
_MODEL_REMEDY = "set --tokenizer-model to the tokenizer.model of a SentencePiece tokenizer"

# How words are cut; the two patterns that --tiktoken-pattern of Megatron-LM chooses between.
PATTERNS = MappingProxyType(
    {
        "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        "v2": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
NUM_SPECIAL_TOKENS = 1000
_DEFAULT_VOCAB = 1 << 17
_RANKS_REMEDY = "set --tokenizer-model to a JSON list of objects with rank, token_bytes and token_str"


class GPTSentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (``tokenizer.model``); the ids are those of the library,
    without a start token.
    """

    type = "GPTSentencePieceTokenizer"

    def __init__(self, path: str, eod_token: str | None = None) -> None:
        self.path, self._eod_token = path, eod_token
        self._model = _load(path)
        self.vocab_size = int(self._model.get_piece_size())

    @property
    def eod(self) -> int:
        """The id of ``--eod-token``, or the model's end of a sentence.  DataError if it has none."""
        if self._eod_token is not None:
            token = int(self._model.piece_to_id(self._eod_token))
            if self._model.id_to_piece(token) != self._eod_token:
                raise no_end_token(self.path, self._eod_token)
            return token
        token = int(self._model.eos_id())
        if token < 0:
            raise no_end_token(self.path, None)
        return token

    def sha256(self) -> str:
        """The SHA-256 of the model file."""
        return file_sum(self.path).sha256

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """See the base class."""
        found = self._model.encode(list(texts), out_type=int, num_threads=1)
        return [np.array(ids, dtype=np.int32) for ids in found]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; control tokens have none."""
        return str(self._model.decode([int(token) for token in ids]))

    def token_bytes_V(self) -> NDArray[np.int32] | None:
        """See the base class; None if the model has an unknown token for what its pieces cannot spell.

        Text counts in the form that the model's normalizer gives it.
        """
        model, ids = self._model, range(self.vocab_size)
        if not any(model.is_byte(token) for token in ids):
            return None
        return np.array([_bytes_of(model, token) for token in ids], dtype=np.int32)


class Llama2Tokenizer(GPTSentencePieceTokenizer):
    """Llama 2's SentencePiece model.  As in megatron-core 0.16, no start token is added."""

    type = "Llama2Tokenizer"


def _bytes_of(model: Any, token: int) -> int:
    if model.is_byte(token):
        return 1
    if model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
        return 0
    return len(model.id_to_piece(token).replace(_SPACE, " ").encode())


def _load(path: str) -> Any:
    try:
        import sentencepiece  # type: ignore[import]
    except ImportError as error:
        message = "SentencePiece models need the sentencepiece library"
        raise HostError(message, remedy="run: pip install sentencepiece") from error
    if not Path(path).is_file():
        raise DataError(f"{path}: there is no such tokenizer file", remedy=_MODEL_REMEDY)
    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise DataError(
            (f"{path}: this is not a SentencePiece model: {reason}"), remedy=_MODEL_REMEDY
        ) from error


class TikTokenizer(Tokenizer):
    """Ids 0 to S - 1 are the special tokens, and id S + r is the byte string of rank r."""

    type = "TikTokenizer"

    def __init__(
        self,
        path: str,
        *,
        vocab_size: int | None = None,
        pattern: str = "v2",
        num_special_tokens: int = NUM_SPECIAL_TOKENS,
        special_tokens: Sequence[str] = (),
        eod_token: str | None = None,
    ) -> None:
        """``vocab_size``: special tokens and ranks; by default 2**17, or the number in the file if that is
        smaller.
        """
        names = tuple(special_tokens) or SPECIAL_TOKENS
        if len(set(names)) < len(names) or len(names) > num_special_tokens or "</s>" not in names:
            rule = (
                "must contain </s>, name each token once, and have at most "
                f"{num_special_tokens} names (--tiktoken-num-special-tokens)"
            )
            raise ConfigError(
                [Problem("--tokenizer-special-tokens", " ".join(names), rule, "correct the list")]
            )
        names += tuple(f"<SPECIAL_{number}>" for number in range(len(names), num_special_tokens))
        ranks = _read(path)
        self.path = path
        largest = num_special_tokens + len(ranks)
        self.vocab_size = min(_DEFAULT_VOCAB, largest) if vocab_size is None else vocab_size
        wanted = self.vocab_size - num_special_tokens
        if not 0 < wanted <= len(ranks):
            message = (
                f"{path} has {len(ranks)} byte strings, but --vocab-size {self.vocab_size} "
                f"needs {wanted} byte strings and {num_special_tokens} special tokens"
            )
            raise DataError(message, remedy=f"use a --vocab-size from {num_special_tokens + 1} to {largest}")
        self._bytes = ranks[:wanted]
        self._special = {name: number for number, name in enumerate(names)}
        self._first = num_special_tokens
        self._end_token = eod_token or "</s>"
        self._encoding = self._encoding_of(PATTERNS[pattern])

    def _encoding_of(self, pattern: str) -> Any:
        try:
            import tiktoken
        except ImportError as error:
            raise HostError(
                "TikTokenizer needs the tiktoken library", remedy="run: pip install tiktoken"
            ) from error
        return tiktoken.Encoding(
            name=Path(self.path).stem,
            pat_str=pattern,
            mergeable_ranks={each: self._first + rank for rank, each in enumerate(self._bytes)},
            special_tokens=self._special,
        )

    @property
    def eod(self) -> int:
        """The id of ``--eod-token``, or of ``</s>``."""
        if self._end_token not in self._special:
            raise no_end_token(
                self.path, self._end_token, [name for name in SPECIAL_TOKENS if name in self._special]
            )
        return self._special[self._end_token]

    def sha256(self) -> str:
        """The SHA-256 of the file."""
        return file_sum(self.path).sha256

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """See the base class; special tokens in a text become their id, as in megatron-core."""
        found = []
        for text in texts:
            with encoding(self.path, text):
                found.append(self._encoding.encode_to_numpy(text, allowed_special="all").astype(np.int32))
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """The text, special tokens included."""
        return str(self._encoding.decode([int(token) for token in ids]))

    def token_bytes_V(self) -> NDArray[np.int32]:
        """See the base class."""
        return np.array([0] * self._first + [len(each) for each in self._bytes], dtype=np.int32)


def _read(path: str) -> list[bytes]:
    """The byte strings by rank; DataError for a file of another kind."""
    if not Path(path).is_file():
        raise DataError(f"{path}: there is no such tokenizer file", remedy=_RANKS_REMEDY)
    try:
        entries = json.loads(Path(path).read_bytes())
        if not isinstance(entries, list) or len(entries) > MOST_IDS:
            raise ValueError("must be a list")
        found = [base64.b64decode(entry["token_bytes"], validate=True) for entry in entries]
        for rank, entry in enumerate(entries):
            if entry["rank"] != rank or (rank < 256 and found[rank] != bytes([rank])):
                raise ValueError(
                    f"entry {rank}: ranks must increase from 0, and the first 256 must be the single bytes"
                )
        if len(set(found)) < max(len(found), 256):
            raise ValueError("must contain the 256 single bytes, and each byte string only once")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise DataError(
            (f"{path}: this is not a rank file for TikTokenizer: {error}"), remedy=_RANKS_REMEDY
        ) from error
    return found
