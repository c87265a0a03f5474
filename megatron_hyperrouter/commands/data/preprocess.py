"""Turn JSON lines, plain text or Parquet into token files in Megatron's format (.bin and .idx)."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence

from megatron_hyperrouter.commands.data.tokenizer_flags import add_tokenizer_flags, tokenizer_options
from megatron_hyperrouter.terminal import Bar, Stopped, counted, parser

EPILOG = """\
Writes P_KEY_document.bin and .idx for each key, byte for byte what Megatron-LM's preprocess_data.py writes
from the same tokenizer, and P_KEY_document.manifest.json with counts and checksums, which mhr inspect
--verify compares.

A name that ends in .jsonl, .json or .ndjson (before .gz or .zst) is JSON lines: each line one document,
blank lines skipped; a value is a string, or a list of strings that become sequences of one document.  A
name that ends in .txt is plain text: the file is one document, stored as sequences of at most 64 KiB of
text, cut at line ends.  A name that ends in .parquet is a table: each row one document, KEY a column.  Any
other file is JSON lines if it starts with "{".

Output has temporary names (.partial) until all of it is written.  Progress is saved every --save-seconds
(P.journal): after a kill, a signal, a full disk or a line that cannot be used, the same command continues
from there, and the output is the same.  On N machines: --shard 1/N to N/N with the same inputs and prefix,
then mhr merge P.  Token ids are uint16 for a vocabulary below 65500, otherwise int32.
"""


def main(arguments: Sequence[str]) -> None:
    """Read the flags, preprocess, say what was written."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # --workers alone says how many cores are used
    from megatron_hyperrouter.data.text.inputs import expand, parse_part
    from megatron_hyperrouter.data.tokenize.preprocess import EncodeSettings, preprocess

    args = read_flags(arguments)
    settings = EncodeSettings(
        tokenizer_options(args),
        tuple(args.json_keys),
        args.append_eod,
        args.tokenizer_backend,
        args.on_bad_line,
    )
    with Progress() as progress:
        try:
            written = preprocess(
                expand(args.input),
                args.output_prefix,
                settings,
                workers=args.workers,
                part=parse_part(args.shard, args.partitions),
                overwrite=args.overwrite,
                save_seconds=args.save_seconds,
                progress=progress.show,
                report=tell,
            )
        except Stopped as reason:
            reason.left = "the same command continues from what was saved, or from the start"
            raise
    for pair in written:
        sizes = f"{counted(pair.documents, 'document')}, {counted(pair.tokens, 'token')}"
        print(f"{pair.prefix}: {sizes}, {pair.dtype.name}", file=sys.stderr)
    tell(progress.summary())


def read_flags(arguments: Sequence[str]) -> Namespace:
    """The flags; a wrong one ends with status 2."""
    from megatron_hyperrouter.data.tokenize.backends import BACKENDS
    from megatron_hyperrouter.data.tokenize.preprocess import SAVE_SECONDS

    flags = parser(__doc__ or "", EPILOG)
    flags.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON lines, plain text (both also .gz and .zst), Parquet; or globs",
    )
    flags.add_argument(
        "--output-prefix", required=True, metavar="P", help="path of the output without _KEY_document.bin"
    )
    flags.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys to take from each line (default: text)",
    )
    add_tokenizer_flags(flags, required=True)
    flags.add_argument(
        "--append-eod", action="store_true", help="end each document with the end-of-document token"
    )
    flags.add_argument(
        "--tokenizer-backend",
        default="auto",
        choices=BACKENDS,
        help="library that encodes; changes no byte of the output (default: auto, the fastest that is "
        "installed and gives the same ids)",
    )
    flags.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that encode (default: 1); changes no byte of the output",
    )
    flags.add_argument(
        "--shard",
        metavar="I/N",
        help="do only part I of N (counted from 1), and write P.shard-I-of-N_KEY_document.*",
    )
    flags.add_argument("--partitions", type=int, metavar="N", help="the N of --shard, if that gives only I")
    flags.add_argument(
        "--on-bad-line",
        choices=("stop", "skip"),
        default="stop",
        help="stop: end at the first line that cannot be used, and keep what was saved (default); skip: "
        "leave such lines out, and report how many there were",
    )
    flags.add_argument(
        "--overwrite",
        action="store_true",
        help="discard what an unfinished run has left, instead of continuing it",
    )
    flags.add_argument(
        "--save-seconds",
        type=float,
        default=SAVE_SECONDS,
        metavar="S",
        help=f"time between two saves (default: {SAVE_SECONDS:g})",
    )
    return flags.parse_args(arguments)


def tell(message: str) -> None:
    """A line on stderr."""
    print(f"mhr preprocess: {message}", file=sys.stderr)


class Progress(Bar):
    """Megabytes and documents, and how fast they pass."""

    def __init__(self) -> None:
        super().__init__("mhr preprocess")
        self._first: tuple[int, int] | None = None  # bytes and documents of the runs before this one
        self._done = self._documents = 0

    def show(self, done: int, total: int, documents: int) -> None:
        """As ``preprocess`` calls it."""
        if self._first is None:
            self._first = (done, documents)
            self.begin_at(done)
            if done:
                tell(f"continuing from {done / 1e6:,.1f} of {total / 1e6:,.1f} MB")
        self._done, self._documents = done, documents
        self.update(done, total, f"{self._rate():,.0f} documents/s")

    def summary(self) -> str:
        """What this run did."""
        passed = self._done - (self._first or (0, 0))[0]
        speeds = f"{self.speed(self._done):,.1f} MB/s, {self._rate():,.0f} documents/s"
        return f"{passed / 1e6:,.1f} MB in {self.seconds():.1f} s, {speeds}"

    def _rate(self) -> float:
        return (self._documents - (self._first or (0, 0))[1]) / self.seconds()
