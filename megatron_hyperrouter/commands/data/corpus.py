"""Turn the text files in a folder and its subfolders into JSON lines, one document per file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_hyperrouter.terminal import Bar, counted, parser

EPILOG = """\
Each line is {"text": ..., "source": path relative to --root}.  The command skips hidden files and folders,
links, __pycache__, site-packages, dist-packages, and files that are binary, blank or not UTF-8.

Documents are sorted by the SHA-256 of their paths, so the order is the same on every machine and mixes the
files of all folders.  Training takes its test data from the end of the corpus (mhr train --split); thanks to
this order, the test data represent the whole corpus."""


def main(arguments: Sequence[str]) -> None:
    """Read the flags, write the corpus, and report what was written."""
    from megatron_hyperrouter.data.text.collect import default_root, write_corpus

    flags = parser(__doc__ or "", EPILOG)
    flags.add_argument(
        "--output",
        required=True,
        metavar="FILE.jsonl",
        help="JSON lines file to write; the file has a temporary name until it is complete",
    )
    flags.add_argument(
        "--root", metavar="DIR", help="folder to search (default: the Python standard library's sources)"
    )
    flags.add_argument(
        "--max-bytes",
        type=int,
        metavar="N",
        help="stop before the first document that would make FILE.jsonl longer than N bytes",
    )
    args = flags.parse_args(arguments)
    with Bar("mhr corpus", "files") as bar:
        made = write_corpus(
            args.root or default_root(), args.output, max_bytes=args.max_bytes, progress=bar.update
        )
    left_out = f"{counted(made.left_out, 'file')} skipped"
    summary = f"{counted(made.documents, 'document')}, {made.size / 1e6:,.1f} MB, {left_out}"
    print(f"{args.output}: {summary}; {bar.seconds():.1f} s", file=sys.stderr)
