"""Turn JSON lines, plain text or Parquet into token files in Megatron's format (.bin and .idx)."""

from __future__ import annotations

import os
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence

from megatron_hyperrouter.commands.data.tokenizer_flags import add_tokenizer_flags, tokenizer_options
from megatron_hyperrouter.terminal import Bar, Stopped, counted, parser

EPILOG = """\
For each KEY the command writes P_KEY_document.bin and .idx, byte for byte what Megatron-LM's
preprocess_data.py writes with the same tokenizer.  P_KEY_document.manifest.json has counts and checksums for
mhr inspect --verify.

The name of an input file, without .gz or .zst, decides how it is read:
  .jsonl, .json, .ndjson   JSON lines: each line is a document; blank lines are skipped.  The value of KEY is
                           a string, or a list of strings, which become the sequences of one document.
  .txt                     plain text: the file is one document, split at line ends into sequences of at most
                           64 KiB.
  .parquet                 a table: each row is a document, and KEY is a column.
  any other                JSON lines if the file begins with "{", else plain text.

Output files have temporary names (.partial) until they are complete.  Progress is saved to P.journal every
--save-seconds.  If a signal, a full disk or a bad line ends the command early, run it again: it
continues from the last save, and the output is the same.  To use N machines, run --shard 1/N to --shard N/N
with the same inputs and prefix, then mhr merge P.  Token ids are stored as uint16 if the vocabulary has fewer
than 65500 ids, else as int32."""


def main(arguments: Sequence[str]) -> None:
    """Read the flags, preprocess, and report what was written."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # only --workers determines how many cores are used
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
    with PreprocessBar() as progress:
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
            reason.left = "run the same command again to continue from the last save, if there is one"
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
        help="input files or glob patterns; the files contain JSON lines, plain text (both also "
        "compressed as .gz or .zst) or Parquet",
    )
    flags.add_argument(
        "--output-prefix",
        required=True,
        metavar="P",
        help="path and prefix P of the output files P_KEY_document.bin and P_KEY_document.idx",
    )
    flags.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="JSON keys or Parquet columns to tokenize; each key gets a separate pair of output "
        "files (default: text)",
    )
    add_tokenizer_flags(flags, required=True)
    flags.add_argument(
        "--append-eod", action="store_true", help="append the end-of-document token to each document"
    )
    flags.add_argument(
        "--tokenizer-backend",
        default="auto",
        choices=BACKENDS,
        help="tokenizer library; the choice does not change the output. auto: the fastest installed "
        "library that supports the tokenizer (default: auto)",
    )
    flags.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="number of processes that tokenize; this number does not change the output (default: 1)",
    )
    flags.add_argument(
        "--shard",
        metavar="I/N",
        help="process only part I of N parts (I from 1 to N); the names of the output files begin "
        "with P.shard-I-of-N",
    )
    flags.add_argument(
        "--partitions", type=int, metavar="N", help="number of parts, if --shard is only I instead of I/N"
    )
    flags.add_argument(
        "--on-bad-line",
        choices=("stop", "skip"),
        default="stop",
        help="what to do with an invalid line. stop: end the command, and keep the progress; skip: "
        "skip the line, and report the number of skipped lines at the end (default: stop)",
    )
    flags.add_argument(
        "--overwrite",
        action="store_true",
        help="start again from the beginning, even if an unfinished run has saved progress",
    )
    flags.add_argument(
        "--save-seconds",
        type=float,
        default=SAVE_SECONDS,
        metavar="S",
        help=f"number of seconds between two saves of the progress (default: {SAVE_SECONDS:g})",
    )
    # Flags of Megatron-LM's tool that do not change what it writes.
    flags.add_argument("--log-interval", type=int, help=SUPPRESS)
    flags.add_argument("--dataset-impl", choices=("mmap",), help=SUPPRESS)
    return flags.parse_args(arguments)


def tell(message: str) -> None:
    """Print a line to stderr."""
    print(f"mhr preprocess: {message}", file=sys.stderr)


class PreprocessBar(Bar):
    """A progress bar with megabytes and documents, and the speed of both."""

    def __init__(self) -> None:
        super().__init__("mhr preprocess")
        self._first: tuple[int, int] | None = None  # bytes and documents that earlier attempts have processed
        self._done = self._documents = 0

    def show(self, done: int, total: int, documents: int) -> None:
        """Called by ``preprocess`` with its progress."""
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
