"""Turn JSON lines or plain text into token files in Megatron's format (.bin and .idx)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from _common import Bar, parser, run_tool

EPILOG = """\
Writes P_KEY_document.bin and .idx for each key, byte for byte what Megatron-LM's preprocess_data.py writes from the same tokenizer.

A name that ends in .jsonl, .json or .ndjson (before .gz or .zst) is JSON lines: each line one document, blank lines skipped; a value
is a string, or a list of strings that become sequences of one document.  A name that ends in .txt is plain text: the file is one
document, stored as sequences of at most 64 KiB of text, cut at line ends.  Any other file is JSON lines if it starts with "{".

Output has temporary names (.partial) until all of it is written; an error or a signal leaves nothing behind.
Token ids are uint16 for a vocabulary below 65500, else int32.
"""


def main(arguments: Sequence[str]) -> None:
    """Read the flags, preprocess, say what was written."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # --workers alone says how many cores are used
    from megatron_hyperrouter.data.backends import BACKENDS
    from megatron_hyperrouter.data.preprocess import Recipe, preprocess

    flags = parser(__doc__ or "", EPILOG)
    flags.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSON lines or plain text, also .gz and .zst")
    flags.add_argument("--output-prefix", required=True, metavar="P", help="path of the output without _KEY_document.bin")
    flags.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys to take from each line (default: text)")
    types = ["ByteTokenizer", "HuggingFaceTokenizer"]
    flags.add_argument("--tokenizer-type", required=True, choices=types, help="bytes as they are, or a tokenizer.json")
    flags.add_argument("--tokenizer-model", metavar="FILE", help="HuggingFaceTokenizer: the tokenizer.json, or its folder")
    flags.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    flags.add_argument(
        "--tokenizer-backend",
        default="auto",
        choices=BACKENDS,
        help="library that encodes; changes no byte of the output (default: auto, the fastest that is installed and gives the same ids)",
    )
    flags.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that encode (default: 1); changes no byte of the output"
    )
    args = flags.parse_args(arguments)
    recipe = Recipe(args.tokenizer_type, args.tokenizer_model, tuple(args.json_keys), args.append_eod, args.tokenizer_backend)
    done = 0

    def tell(message: str) -> None:
        print(f"preprocess_data: {message}", file=sys.stderr)

    with Bar("preprocess_data") as bar:

        def show(bytes_done: int, bytes_total: int) -> None:
            nonlocal done
            done = bytes_done
            bar.update(bytes_done, bytes_total)

        written = preprocess(args.input, args.output_prefix, recipe, workers=args.workers, progress=show, report=tell)
    for pair in written:
        print(f"{pair.prefix}: {pair.documents:,} documents, {pair.tokens:,} tokens, {pair.dtype.name}", file=sys.stderr)
    print(f"preprocess_data: {done / 1e6:,.1f} MB in {bar.seconds():.1f} s, {bar.speed(done):,.1f} MB/s", file=sys.stderr)


if __name__ == "__main__":
    run_tool(main)
