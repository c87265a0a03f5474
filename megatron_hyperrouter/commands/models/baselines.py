"""Compare a run's scores with unigram and bigram baselines on the same tokens.

The command fits both baselines to the training split of the run's data, scores them on the tokens that
mhr evaluate scored in one process, and prints a table in bits per byte.  If the run was trained with
--eod-mask-loss, neither the model nor the baselines are scored on the first token of a document.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.evaluate.trained import TrainedRun, add_run_flags
from megatron_hyperrouter.files import check_output, write_json
from megatron_hyperrouter.terminal import Bar, parser

if TYPE_CHECKING:
    import numpy as np

    from megatron_hyperrouter.data.stream.dataset import Dataset, Splits


def main(arguments: Sequence[str]) -> None:
    """Results of an evaluation -> data of that run -> baselines -> table."""
    flags = parser(__doc__ or "")
    add_run_flags(flags)
    flags.add_argument(
        "--results",
        type=Path,
        required=True,
        metavar="FILE.json",
        help="JSON file that mhr evaluate wrote for the test split",
    )
    flags.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="also write the numbers in the printed table to this JSON file",
    )
    args = flags.parse_args(arguments)

    from megatron_hyperrouter.data.stream.dataset import build_splits
    from megatron_hyperrouter.errors import DataError
    from megatron_hyperrouter.evaluate.whereabouts import are_own

    if args.output is not None:
        check_output(args.output)
    run = TrainedRun.open(args.load, tokenizer_model=args.tokenizer_model)
    results = read_results(
        args.results,
        args.data_path,
        is_own=lambda words: are_own(words, run.settings.data, run.manifest["meta"]),
    )
    config, tokenizer = run.settings, run.tokenizer()
    bytes_V = tokenizer.token_bytes_V()
    if bytes_V is None:
        raise DataError(
            (
                f"bits per byte cannot be computed, because a {config.data.tokenizer_type} does not "
                "provide the bytes of its tokens"
            ),
            remedy="evaluate a run that was trained with a byte-level tokenizer",
        )
    splits = build_splits(
        run.data(split="test", data_path=args.data_path),
        seq_length=config.model.seq_length,
        seed=config.train.seed,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.identity(),
        eod=tokenizer.eod if config.data.pack_documents else None,
        train_samples=None,
        valid_samples=0,
        test_samples=None,
    )
    eod = tokenizer.eod if config.data.eod_mask_loss else None
    with Bar("baselines", "samples") as bar:
        rows = baseline_bits(
            splits, results[0]["tokens"], bytes_V, tokenizer.vocab_size, eod=eod, progress=bar.update
        )
    rows |= {
        f"model, k = {row['topk']} of {config.model.num_experts}": row["bits_per_byte"] for row in results
    }
    show(rows, results[0]["tokens"], masked=eod is not None)
    if args.output is not None:
        write_json(args.output, {"bits_per_byte": rows, "tokens": results[0]["tokens"]})


def read_results(
    path: Path,
    data_path: Sequence[str] | None = None,
    is_own: Callable[[Sequence[str]], bool] = lambda words: False,
) -> list[dict[str, Any]]:
    """The rows of an evaluation; DataError if the baselines with ``data_path`` would score other tokens.

    ``is_own``: whether files are those of the run.  Other files are compared by name.
    """
    from megatron_hyperrouter.errors import DataError

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        results = [
            {"topk": int(row["topk"]), "tokens": int(row["tokens"]), "bits_per_byte": row["bits_per_byte"]}
            for row in found["results"]
        ]
        data = [str(word) for word in found.get("data") or ()]
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}", remedy="give the file that mhr evaluate wrote"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} contains no evaluation results",
            remedy="give the file that mhr evaluate --output FILE.json wrote",
        ) from error
    if not results:
        raise DataError(f"{path} has no results", remedy="evaluate the run with at least one k")
    split, stride, other = found.get("split"), found.get("eval_stride"), ""
    if split not in (None, "test"):
        other = f"of the {split} split"
    elif stride is not None:
        other = f"with --eval-stride {stride}"
    elif _names(data) != _names(data_path or ()) and not all(map(is_own, filter(None, (data, data_path)))):
        other = f"with --data-path {' '.join(data)}" if data else "of the run's own data"
    if other:
        scored = f"of --data-path {' '.join(data_path)}" if data_path else "of the run's data"
        raise DataError(
            f"{path} contains an evaluation {other}, but the baselines score adjacent windows of the test "
            f"split {scored}",
            remedy="run mhr evaluate again for the test split, without --eval-stride, and with the same "
            "--data-path as mhr baselines",
        )
    return results


def _names(words: Sequence[str]) -> list[str]:
    """The names of token files, wherever they are."""
    return [Path(word).name for word in words]


def baseline_bits(
    splits: Splits,
    tokens: int,
    bytes_V: np.ndarray,
    vocab_size: int,
    *,
    eod: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float | None]:
    """Bits per byte of both baselines on the first ``tokens`` targets of the test split, in the order of
    an evaluation.

    ``eod``: the id that ends a document, if tokens after it are not scored.  ``progress(samples, all
    samples)`` of the training data.
    """
    import numpy as np

    from megatron_hyperrouter.errors import DataError
    from megatron_hyperrouter.evaluate.ngram import NgramBaselines

    if splits.train is None or splits.test is None:
        raise DataError(
            "the run has no training data or no test data",
            remedy="use a run with a --split of three numbers greater than 0",
        )
    fitted = NgramBaselines(stretches(splits.train, eod, progress), vocab_size)
    parts, left = [np.zeros((0, 2), np.int64)], tokens
    for sample in samples_of(splits.test):
        if left <= 0:
            break
        pairs_N2 = np.stack([sample[:-1], sample[1:]], axis=1)
        parts.append(pairs_N2 if eod is None else pairs_N2[pairs_N2[:, 0] != eod])
        left -= len(parts[-1])
    if left:
        raise DataError(
            f"the results cover {tokens:,} tokens, which is not a whole number of samples of the test split",
            remedy="run mhr evaluate again in one process, with the data of the run",
        )
    contexts_N, targets_N = np.concatenate(parts).T
    per_byte = targets_N.size / bytes_V[targets_N].sum() / math.log(2)
    return {
        "unigram": fitted.unigram_nats(targets_N) * per_byte,
        "bigram": fitted.bigram_nats(contexts_N, targets_N) * per_byte,
    }


def samples_of(dataset: Dataset, progress: Callable[[int, int], None] | None = None) -> Iterator[np.ndarray]:
    """The samples, one after another; ``progress(samples, all samples)`` is called after each."""
    for i in range(len(dataset)):
        yield dataset[i]
        if progress:
            progress(i + 1, len(dataset))


def stretches(
    dataset: Dataset, eod: int | None, progress: Callable[[int, int], None] | None = None
) -> Iterator[np.ndarray]:
    """Samples, split after each ``eod``.  Parts of one token, such as padding, contain no bigram."""
    import numpy as np

    for sample in samples_of(dataset, progress):
        parts = [sample] if eod is None else np.split(sample, np.flatnonzero(sample == eod) + 1)
        yield from (part for part in parts if len(part) > 1)


def show(rows: dict[str, float | None], tokens: int, *, masked: bool) -> None:
    """The table for the terminal; a loss that is not finite has no bits per byte."""
    from rich.console import Console
    from rich.table import Table

    left_out = ", without the first token of each document" if masked else ""
    table = Table(title=f"bits per byte on {tokens:,} tokens of the test split{left_out}")
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    table.add_column("change from bigram", justify="right")
    bigram = rows["bigram"]
    for name, bits in rows.items():
        change = f"{bits / bigram - 1:+.1%}" if bits is not None and bigram else "-"
        table.add_row(name, "-" if bits is None else f"{bits:.4f}", change)
    Console().print(table)
