"""Compare the CPU time of tools/preprocess_data.py with that of Megatron-LM's two preprocessing tools.

The goals are 1/8 of the time of Megatron-LM's preprocess_data.py, and 1/3 of the time of its
preprocess_data_fast.py.  ``_preprocess_peer.py`` reproduces these two tools.  Each run is a separate
process. Its time is the CPU time of the process and all its workers, from the start of the interpreter to
its end. The two sides take turns, and must write the same bytes.  With ``--threads`` N, both sides use N
processes.

The text is the source files of the Python standard library, in the order that make_corpus.py writes,
repeated up to the given size.  The BPE tokenizer is trained on the beginning of this text.
"""

from __future__ import annotations

import filecmp
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

from _pairs import PairedTimes, Seconds, flags, in_turn, print_table

HERE = Path(__file__).resolve().parent
Case = tuple[str, str, str, float]
CASES: tuple[Case, ...] = (  # name, peer, back end of ours, goal
    ("preprocess_data.py", "one", "auto", 1 / 8),
    ("preprocess_data.py, tokenizers", "one", "tokenizers", 1.0),
    ("preprocess_data_fast.py", "batch", "auto", 1 / 3),
)


class DifferentBytes(RuntimeError):
    """The two sides did not write the same files."""


def main() -> None:
    """Read the flags, make the text and the tokenizer, print a row for each peer."""
    parser = flags(__doc__ or "", pairs=5)
    parser.add_argument(
        "--megabytes",
        type=float,
        default=33.0,
        metavar="MB",
        help="size of the JSON lines in MB (default: 33)",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=32_000,
        metavar="N",
        help="vocabulary size of the tokenizer (default: 32000)",
    )
    args = parser.parse_args()
    size, vocabulary, pairs = (0.3, 1000, 2) if args.quick else (args.megabytes, args.vocab_size, args.pairs)
    cases, warm_up = (CASES[::2], 0) if args.quick else (CASES, min(args.warm_up, 1))
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(
            Path(folder),
            int(size * 1e6),
            vocabulary,
            cases=cases,
            workers=args.threads,
            warm_up=warm_up,
            pairs=pairs,
        )
        print_table(rows, base="Megatron-LM's", ours="ours")


def measured(
    folder: Path,
    size: int,
    vocabulary: int,
    *,
    pairs: int,
    cases: Sequence[Case] = CASES[::2],
    workers: int = 1,
    warm_up: int = 0,
) -> Iterator[PairedTimes]:
    """A row for each case, of ``size`` bytes of JSON lines; benchmarks/data.py takes those of the goals."""
    source, tokenizer = make_inputs(folder, size, vocabulary)
    for case in cases:
        yield row(case, folder, source, tokenizer, workers, warm_up, pairs)


def make_inputs(folder: Path, size: int, vocabulary: int) -> tuple[Path, Path]:
    """The text and the tokenizer."""
    from megatron_hyperrouter.data.text.collect import default_root, write_corpus
    from megatron_hyperrouter.data.text.corpus import texts
    from megatron_hyperrouter.data.tokenize.bpe import train_bpe

    once, source, tokenizer = folder / "once.jsonl", folder / "corpus.jsonl", folder / "tokenizer.json"
    write_corpus(default_root(), str(once), max_bytes=size)
    with open(once, "rb") as lines, open(source, "wb") as out:
        every = lines.readlines()
        for line in cycle(every):
            if out.tell() + len(line) > size and out.tell():
                break
            out.write(line)
    train_bpe(texts([str(source)], max_bytes=12_000_000), vocabulary, str(tokenizer))
    return source, tokenizer


def row(
    case: Case, folder: Path, source: Path, tokenizer: Path, workers: int, warm_up: int, pairs: int
) -> PairedTimes:
    """Measure one peer; DifferentBytes where the files differ."""
    name, peer, backend, goal = case

    def theirs() -> Seconds:
        return run(
            "benchmarks/_preprocess_peer.py",
            peer,
            source,
            folder / "theirs_text_document",
            tokenizer,
            workers,
        )

    def ours() -> Seconds:
        options = (
            "--tokenizer-type",
            "HuggingFaceTokenizer",
            "--tokenizer-model",
            tokenizer,
            "--tokenizer-backend",
            backend,
        )
        where = ("--input", source, "--output-prefix", folder / "ours", "--append-eod", "--workers", workers)
        return run("tools/preprocess_data.py", *where, *options)

    for _ in range(warm_up):
        theirs(), ours()
    base, own = in_turn(theirs, ours, pairs=pairs)
    for ending in ("bin", "idx"):
        if not filecmp.cmp(
            folder / f"theirs_text_document.{ending}", folder / f"ours_text_document.{ending}", shallow=False
        ):
            raise DifferentBytes(f"{name}: the .{ending} files differ")
    return PairedTimes(name, goal, base, own)


def run(program: str, *arguments: object) -> Seconds:
    """One process from start to end, with all that it waited for."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE.parent / program), *map(str, arguments)]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    told = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{program}: {told}")
    return Seconds(time.perf_counter() - start, usage.ru_utime + usage.ru_stime)


if __name__ == "__main__":
    main()
