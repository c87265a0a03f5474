"""Builds the tokenizer that ``--tokenizer-type`` and the other tokenizer flags describe."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from megatron_hyperrouter.data.tokenize.base import END_OF_TEXT, ByteTokenizer, NullTokenizer, Tokenizer
from megatron_hyperrouter.data.tokenize.huggingface import GPT2BPETokenizer, HuggingFaceTokenizer
from megatron_hyperrouter.data.tokenize.other_libraries import (
    NUM_SPECIAL_TOKENS,
    GPTSentencePieceTokenizer,
    Llama2Tokenizer,
    TikTokenizer,
)
from megatron_hyperrouter.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import DataConfig

__all__ = [
    "END_OF_TEXT",
    "TEXT_TOKENIZER_TYPES",
    "TOKENIZER_TYPES",
    "ByteTokenizer",
    "GPT2BPETokenizer",
    "GPTSentencePieceTokenizer",
    "HuggingFaceTokenizer",
    "Llama2Tokenizer",
    "NullTokenizer",
    "TikTokenizer",
    "Tokenizer",
    "TokenizerOptions",
    "build_tokenizer",
    "missing_option",
    "tokenizer_from",
    "tokenizer_of",
]

TOKENIZER_TYPES = (
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "GPT2BPETokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
    "NullTokenizer",
)
TEXT_TOKENIZER_TYPES = TOKENIZER_TYPES[:-1]  # those that can encode text


@dataclass(frozen=True)
class TokenizerOptions:
    """The flags that describe a tokenizer, by their names."""

    tokenizer_type: str
    tokenizer_model: str | None = None
    vocab_size: int | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    eod_token: str | None = None
    tiktoken_pattern: str = "v2"
    tiktoken_num_special_tokens: int = NUM_SPECIAL_TOKENS
    tokenizer_special_tokens: tuple[str, ...] = ()


def tokenizer_of(data: DataConfig) -> Tokenizer:
    """The tokenizer of a run's settings.  Raises as :func:`tokenizer_from`."""
    return tokenizer_from(
        TokenizerOptions(**{each.name: getattr(data, each.name) for each in fields(TokenizerOptions)})
    )


def build_tokenizer(
    tokenizer_type: str, tokenizer_model: str | None = None, vocab_size: int | None = None
) -> Tokenizer:
    """The tokenizer of this type and file, with defaults for everything else.  Raises as
    :func:`tokenizer_from`.
    """
    return tokenizer_from(TokenizerOptions(tokenizer_type, tokenizer_model, vocab_size))


def tokenizer_from(options: TokenizerOptions) -> Tokenizer:
    """The tokenizer that the options describe.

    Raises ConfigError (an unknown type, or an option that it needs and lacks), DataError (an unreadable
    file), HostError (a missing library).
    """
    kind, model, eod_token = options.tokenizer_type, options.tokenizer_model, options.eod_token
    if problem := missing_option(options):
        raise ConfigError([problem])
    match kind:
        case "ByteTokenizer":
            return ByteTokenizer()
        case "NullTokenizer":
            return NullTokenizer(options.vocab_size or 0)
        case "HuggingFaceTokenizer":
            return HuggingFaceTokenizer(model or "", eod_token)
        case "GPT2BPETokenizer":
            return GPT2BPETokenizer(options.vocab_file, options.merge_file, model, eod_token)
        case "GPTSentencePieceTokenizer":
            return GPTSentencePieceTokenizer(model or "", eod_token)
        case "Llama2Tokenizer":
            return Llama2Tokenizer(model or "", eod_token)
    return TikTokenizer(
        model or "",
        vocab_size=options.vocab_size,
        pattern=options.tiktoken_pattern,
        num_special_tokens=options.tiktoken_num_special_tokens,
        special_tokens=options.tokenizer_special_tokens,
        eod_token=eod_token,
    )


def missing_option(options: TokenizerOptions) -> Problem | None:
    """What the chosen type needs and lacks."""
    kind = options.tokenizer_type
    if kind not in TOKENIZER_TYPES:
        return Problem(
            "--tokenizer-type", kind, "is not a tokenizer type", f"use {', '.join(TOKENIZER_TYPES)}"
        )
    if kind == "NullTokenizer":
        if options.vocab_size is None or options.vocab_size < 1:
            rule = "must be given with NullTokenizer"
            return Problem(
                "--vocab-size", options.vocab_size, rule, ("add --vocab-size N, the number of token ids")
            )
        return None
    if kind == "GPT2BPETokenizer" and options.tokenizer_model is None:
        if options.vocab_file is None or options.merge_file is None:
            flag = "--vocab-file" if options.vocab_file is None else "--merge-file"
            return Problem(
                flag,
                None,
                f"must be given with {kind}",
                ("add --vocab-file vocab.json and --merge-file merges.txt"),
            )
        return None
    if kind != "ByteTokenizer" and not options.tokenizer_model:
        rule = f"must be given with {kind}"
        return Problem(
            "--tokenizer-model",
            options.tokenizer_model,
            rule,
            "add --tokenizer-model FILE, the file of the tokenizer",
        )
    return None
