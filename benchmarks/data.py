"""Compare the CPU time of this project's data pipeline with that of megatron-core's helpers and datasets.

Both sides take turns and must give the same bits.  The table shows the goal of each case, as a ratio of CPU
times (ours / megatron-core's).  All cases together take about ten minutes, most of it for preprocessing;
benchmarks/preprocess.py has more cases of preprocessing.  The last line is the cold start of a dataset with
10**8 documents, which is not compared with megatron-core.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _data_process import in_a_process
from _pairs import PairedTimes, Seconds, flags, in_turn, print_table, stopwatch
from _token_files import SEQ_LENGTH, megatron_dataset, our_dataset, write_sizes, write_tokens
from preprocess import measured as preprocessing

from megatron_hyperrouter.data.order import index

PARTS = ("preprocess", "index", "shuffle", "dataset", "blend", "sample", "cold")
Work = Callable[[], Any]


class DifferentWork(RuntimeError):
    """The two results differ, so their times do not compare."""


def main() -> None:
    """Read the flags, measure each case, print the table."""
    parser = flags(__doc__ or "", pairs=5)
    parser.add_argument(
        "--part", choices=PARTS, action="append", help="measure only this part (you can repeat the flag)"
    )
    args = parser.parse_args()
    parts = args.part or PARTS
    scale = 2000 if args.quick else 1
    pairs = 2 if args.quick else args.pairs
    memory: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(parts, Path(folder), pairs=pairs, scale=scale, memory=memory)
        print_table(rows, base="megatron", ours="ours", clock="cpu")
        print("\n".join(memory))
        if "cold" in parts:
            cold_start(Path(folder), 10**8 // scale)


def measured(
    parts: tuple[str, ...], folder: Path, *, pairs: int, scale: int, memory: list[str]
) -> Iterator[PairedTimes]:
    """The rows of these parts; ``memory`` takes the lines of peak memory."""
    if "preprocess" in parts:
        size, vocabulary = (33 * 10**6, 32_000) if scale == 1 else (3 * 10**5, 1000)
        yield from preprocessing(folder, size, vocabulary, pairs=min(pairs, 3))
    if "index" in parts:
        for epochs in (1, 3):
            yield sample_index(10**7 // scale, epochs, pairs=pairs)
    if "shuffle" in parts:
        for count in (10**7, 3 * 10**7):
            yield shuffle(count // scale, pairs=pairs)
    if "dataset" in parts:
        for epochs in (1, 3):
            yield fresh_dataset(folder, 10**7 // scale, epochs, pairs=pairs, memory=memory)
    if "blend" in parts:
        yield blend(64, 5 * 10**6 // scale, 1 / 1.2, pairs=pairs)
        yield blend(256, 10**6 // scale, 1 / 1.5, pairs=pairs)
        yield exhaustive(64, 10**6 // scale, pairs=pairs)
    if "sample" in parts:
        yield from samples(folder, pairs=pairs, count=20 if scale > 1 else 2000)


def compared(case: str, goal: float, base: Work, ours: Work, *, pairs: int) -> PairedTimes:
    """Both timed in turn, after one run of each; their results must be the same arrays."""
    results: dict[str, Any] = {}

    def timed(name: str, work: Work) -> Callable[[], Seconds]:
        return lambda: stopwatch(lambda: results.__setitem__(name, work()))

    first, second = timed("base", base), timed("ours", ours)
    first(), second()
    times = in_turn(first, second, pairs=pairs)
    if not all(
        np.array_equal(one, other) for one, other in zip(results["base"], results["ours"], strict=True)
    ):
        raise DifferentWork(case)
    return PairedTimes(case, goal, *times)


def sizes_of(documents: int) -> np.ndarray:
    """Tokens of documents, 1000 on average."""
    return np.random.default_rng(0).integers(200, 1801, documents).astype(np.int32)


def sample_index(documents: int, epochs: int, *, pairs: int) -> PairedTimes:
    """Cutting shuffled documents into samples."""
    from megatron.core.datasets import helpers

    sizes = sizes_of(documents)
    order = np.tile(np.arange(documents, dtype=np.int32), epochs)
    np.random.RandomState(0).shuffle(order)
    total = int(sizes.sum(dtype=np.int64))
    return compared(
        f"sample index, {documents:.0e} documents x {epochs}",
        1 / 2,
        lambda: [helpers.build_sample_idx(sizes, order, SEQ_LENGTH, epochs, total, True, 1)],
        lambda: [index.sample_index(sizes, order, SEQ_LENGTH, epochs, total)],
        pairs=pairs,
    )


def shuffle(count: int, *, pairs: int) -> PairedTimes:
    """NumPy's shuffle, as megatron-core calls it."""

    def run(how: Callable[[np.ndarray, np.random.RandomState], object]) -> list[np.ndarray]:
        values = np.arange(count, dtype=np.uint32)
        how(values, np.random.RandomState(1))
        return [values]

    return compared(
        f"shuffle, {count:.0e}",
        1 / 4,
        lambda: run(lambda values, state: state.shuffle(values)),
        lambda: run(index.shuffle),
        pairs=pairs,
    )


def blend(sets: int, size: int, goal: float, *, pairs: int) -> PairedTimes:
    """A blend with weights."""
    from megatron.core.datasets import helpers

    weights = np.random.default_rng(0).random(sets) + 0.01
    weights /= weights.sum()

    def base() -> tuple[np.ndarray, np.ndarray]:
        chosen, samples = np.zeros(size, np.int16), np.zeros(size, np.int64)
        helpers.build_blending_indices(chosen, samples, weights, sets, size, False)
        return chosen, samples

    return compared(
        f"blend, {sets} sets, {size:.0e} samples",
        goal,
        base,
        lambda: index.blending_indices(weights, size),
        pairs=pairs,
    )


def exhaustive(sets: int, size: int, *, pairs: int) -> PairedTimes:
    """A blend that uses up every set."""
    from megatron.core.datasets import helpers

    sizes = np.random.default_rng(0).integers(size // sets // 2 + 1, 3 * size // sets // 2 + 2, sets)
    total = int(sizes.sum())

    def base() -> tuple[np.ndarray, np.ndarray]:
        chosen, samples = np.zeros(total, np.int16), np.zeros(total, np.int64)
        helpers.build_exhaustive_blending_indices(chosen, samples, sizes, sets)
        return chosen, samples

    return compared(
        f"exhaustive blend, {sets} sets, {total:.0e}",
        1 / 4,
        base,
        lambda: index.exhaustive_blending_indices(sizes),
        pairs=pairs,
    )


def fresh_dataset(folder: Path, documents: int, epochs: int, *, pairs: int, memory: list[str]) -> PairedTimes:
    """A new process that builds a dataset of ``epochs`` epochs, stores its index files, and reads ten
    samples.
    """
    prefix = folder / "sizes"
    if not prefix.with_suffix(".idx").exists():
        write_sizes(prefix, sizes_of(documents))
    peaks: dict[str, list[float]] = {"megatron": [], "ours": []}

    def run(kind: str) -> Seconds:
        told = in_a_process(kind, prefix, epochs=epochs)
        peaks[kind].append(told["peak_mb"])
        return Seconds(told["wall"], told["cpu"])

    case = f"fresh dataset, {documents:.0e} documents x {epochs}"
    row = PairedTimes(case, 1 / 3, *in_turn(lambda: run("megatron"), lambda: run("ours"), pairs=pairs))
    base, ours = (float(np.median(each)) for each in peaks.values())
    memory.append(
        f"{case}: peak memory over the imports {base:.0f} MB, ours {ours:.0f} MB: {ours / base:.2f} of it "
        "(goal <= 0.50)"
    )
    return row


def samples(folder: Path, *, pairs: int, count: int) -> Iterator[PairedTimes]:
    """Reading samples one by one, in both orders of ours."""
    prefix = folder / "tokens"
    write_tokens(prefix, sizes_of(20_000))
    theirs, mine = megatron_dataset(prefix, count), our_dataset(prefix, count)
    for i in (0, count - 1):
        if not np.array_equal(theirs[i]["tokens"].numpy(), mine[i][:-1]):
            raise DifferentWork(f"sample {i}")
    for name, dataset in (("", mine), (", on demand", our_dataset(prefix, count, data_index="on-demand"))):
        yield read_one_by_one(f"{count} samples of {SEQ_LENGTH}{name}", theirs, dataset, count, pairs=pairs)


def read_one_by_one(case: str, theirs: Any, mine: Any, count: int, *, pairs: int) -> PairedTimes:
    """Samples 0 to ``count`` of both."""

    def base() -> object:
        return [theirs[i] for i in range(count)]

    def ours() -> object:
        return [mine[i] for i in range(count)]

    base(), ours()
    return PairedTimes(case, 1 / 5, *in_turn(lambda: stopwatch(base), lambda: stopwatch(ours), pairs=pairs))


def cold_start(folder: Path, documents: int) -> None:
    """Print what the first batch over the sizes of this many documents takes a new process, imports and a
    cold disk included.
    """
    prefix = folder / "huge"
    write_sizes(prefix, sizes_of(documents))
    with open(f"{prefix}.idx", "rb") as stream:  # out of the system's memory, as on a node that never read it
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    told = in_a_process("cold", prefix, epochs=1)
    print(
        f"{documents:.0e} documents, on demand, from the start of a new process to its first 10 samples: "
        f"{told['all_wall']:.2f} s (goal <= 2), "
        f"{told['all_cpu']:.2f} s of CPU time, peak memory {told['all_mb']:.0f} MB (goal <= 300)"
    )


if __name__ == "__main__":
    main()
