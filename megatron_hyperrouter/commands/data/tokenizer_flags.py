"""The flags that describe a tokenizer, for every command that takes them without a run's settings."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_hyperrouter.data.tokenize.tokenizer import TokenizerOptions


def add_tokenizer_flags(flags: ArgumentParser, *, required: bool) -> None:
    """Add the flags; their names and meanings are those of ``mhr train``."""
    from megatron_hyperrouter.data.tokenize.tokenizer import TEXT_TOKENIZER_TYPES, TokenizerOptions

    group = flags.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer-type",
        required=required,
        choices=TEXT_TOKENIZER_TYPES,
        metavar="NAME",
        help=f"type of the tokenizer: {', '.join(TEXT_TOKENIZER_TYPES)}. ByteTokenizer uses each byte as a "
        "token; the other types need a tokenizer file",
    )
    group.add_argument(
        "--tokenizer-model",
        metavar="FILE",
        help="tokenizer file; for HuggingFaceTokenizer: tokenizer.json, its folder, or the name of a "
        "model on the Hugging Face hub",
    )
    group.add_argument("--vocab-file", metavar="FILE", help="for GPT2BPETokenizer: path of vocab.json")
    group.add_argument("--merge-file", metavar="FILE", help="for GPT2BPETokenizer: path of merges.txt")
    group.add_argument("--vocab-size", type=int, metavar="N", help="for TikTokenizer: number of token ids")
    group.add_argument(
        "--eod-token",
        metavar="TOKEN",
        help="token that marks the end of a document (default: the end-of-document token in the "
        "tokenizer's files)",
    )
    defaults = TokenizerOptions("")
    group.add_argument(
        "--tiktoken-pattern",
        choices=("v1", "v2"),
        default=defaults.tiktoken_pattern,
        help="for TikTokenizer: version of the pre-tokenization pattern (default: "
        f"{defaults.tiktoken_pattern})",
    )
    number = defaults.tiktoken_num_special_tokens
    group.add_argument(
        "--tiktoken-num-special-tokens",
        type=int,
        default=number,
        metavar="N",
        help="for TikTokenizer: number of special tokens; they have the first ids, before the tokens in the "
        f"file (default: {number})",
    )
    group.add_argument(
        "--tokenizer-special-tokens",
        nargs="+",
        default=(),
        metavar="TOKEN",
        help="for TikTokenizer: names of the first special tokens (default: the same names as in "
        "Megatron-LM)",
    )


def tokenizer_options(args: Namespace) -> TokenizerOptions:
    """What the flags describe."""
    from megatron_hyperrouter.data.tokenize.tokenizer import TokenizerOptions

    values = {each.name: getattr(args, each.name) for each in fields(TokenizerOptions)}
    return TokenizerOptions(**values | {"tokenizer_special_tokens": tuple(args.tokenizer_special_tokens)})
