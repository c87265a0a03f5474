"""Train a byte-level BPE tokenizer (Hugging Face format) on JSON lines, plain text or Parquet."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_hyperrouter.terminal import Bar, parser

EPILOG = """\
Words are split as in GPT-2; <|endoftext|> has id 0. The same input gives the same file, byte for byte."""


def main(arguments: Sequence[str]) -> None:
    """Read the flags, train, and report what was written."""
    from megatron_hyperrouter.data.text.corpus import texts
    from megatron_hyperrouter.data.text.inputs import expand, total_bytes
    from megatron_hyperrouter.data.tokenize.bpe import train_bpe
    from megatron_hyperrouter.errors import ConfigError, Problem
    from megatron_hyperrouter.files import check_output

    flags = parser(__doc__ or "", EPILOG)
    flags.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="input files or glob patterns; the files contain JSON lines, plain text (both also "
        "compressed as .gz or .zst) or Parquet",
    )
    flags.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        metavar="N",
        help="vocabulary size, at least 257; it includes 256 bytes, <|endoftext|> and the merges of the BPE",
    )
    flags.add_argument(
        "--output",
        required=True,
        metavar="tokenizer.json",
        help="tokenizer file to write; the file has a temporary name until it is complete",
    )
    flags.add_argument(
        "--json-key",
        "--json-keys",
        default="text",
        metavar="KEY",
        help="JSON key or Parquet column that contains the text (default: text)",
    )
    flags.add_argument(
        "--max-bytes",
        type=int,
        metavar="N",
        help="train on only the first N bytes of text (default: all of the text)",
    )
    args = flags.parse_args(arguments)
    inputs = expand(args.input)
    total_bytes(inputs)
    problems = []
    if args.max_bytes is not None and args.max_bytes < 1:
        problems.append(
            Problem(
                "--max-bytes",
                args.max_bytes,
                "must be at least 1",
                ("leave out --max-bytes to train on all of the text"),
            )
        )
    if any(os.path.realpath(path) == os.path.realpath(args.output) for path in inputs):
        problems.append(
            Problem("--output", args.output, "is one of the inputs", ("give the output another name"))
        )
    if problems:
        raise ConfigError(problems)
    check_output(Path(args.output))
    with Bar("mhr tokenizer") as bar:
        found = texts(inputs, args.json_key, args.max_bytes, progress=bar.update)
        size = train_bpe(found, args.vocab_size, args.output)
    fewer = (
        ""
        if size == args.vocab_size
        else f" instead of {args.vocab_size:,}, because the text has no more pairs to merge"
    )
    print(f"{args.output}: {size:,} tokens{fewer}; {bar.seconds():.1f} s", file=sys.stderr)
