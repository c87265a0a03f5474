"""Set a model's scores beside the unigram and bigram baselines of the same tokens.

Fits both baselines on the training part of the run's data, scores them on the targets that tools/evaluate.py scored in one
process, and prints a table in bits per byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import parser, run_tool

if TYPE_CHECKING:
    import numpy as np

    from megatron_hyperrouter.data.dataset import Splits


def main(arguments: Sequence[str]) -> None:
    """Results of an evaluation -> data of that run -> baselines -> table."""
    flags = parser(__doc__ or "")
    flags.add_argument("--load", type=Path, required=True, metavar="RUN_DIR", help="run folder that was evaluated")
    flags.add_argument("--results", type=Path, required=True, metavar="FILE.json", help="what tools/evaluate.py wrote, for the test split")
    flags.add_argument("--output", type=Path, metavar="FILE.json", help="write the table's numbers here, too")
    args = flags.parse_args(arguments)

    from megatron_hyperrouter.config.cli import load_file
    from megatron_hyperrouter.data.dataset import build_splits
    from megatron_hyperrouter.data.tokenizer import build_tokenizer
    from megatron_hyperrouter.errors import DataError
    from megatron_hyperrouter.routers import ROUTERS

    results: list[dict[str, Any]] = read_results(args.results)
    config = load_file(args.load / "config.yaml", routers=ROUTERS)
    tokenizer = build_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model, config.data.vocab_size)
    bytes_V = tokenizer.token_bytes_V()
    if bytes_V is None:
        raise DataError(f"{config.data.tokenizer_type} does not tell the bytes of its tokens", remedy="use a byte-level tokenizer")
    splits = build_splits(
        config.data,
        seq_length=config.model.seq_length,
        seed=config.train.seed,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod if config.data.pack_documents else None,
        train_samples=None,
        valid_samples=0,
        test_samples=None,
    )
    rows = baseline_bits(splits, results[0]["tokens"], bytes_V, tokenizer.vocab_size)
    rows |= {f"model, k = {row['topk']} of {config.model.num_experts}": row["bits_per_byte"] for row in results}
    show(rows, results[0]["tokens"])
    if args.output is not None:
        args.output.write_text(json.dumps({"bits_per_byte": rows, "tokens": results[0]["tokens"]}, indent=2) + "\n", encoding="utf-8")


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of an evaluation."""
    from megatron_hyperrouter.errors import DataError

    try:
        results: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not an evaluation: {error!r}", remedy="write it with tools/evaluate.py --output FILE.json") from error
    if not results:
        raise DataError(f"{path}: no results", remedy="evaluate at one k at least")
    return results


def baseline_bits(splits: Splits, tokens: int, bytes_V: np.ndarray, vocab_size: int) -> dict[str, float]:
    """Bits per byte of both baselines on the first ``tokens`` targets of the test split, in the order of an evaluation."""
    import numpy as np

    from megatron_hyperrouter.data.ngram import NgramBaselines
    from megatron_hyperrouter.errors import DataError

    if splits.train is None or splits.test is None:
        raise DataError("the run has no training or no test data", remedy="give all three shares of --split a number above 0")
    fitted = NgramBaselines((splits.train[i] for i in range(len(splits.train))), vocab_size)
    length = splits.test[0].size - 1
    samples = np.stack([splits.test[i] for i in range(tokens // length)])
    contexts_N, targets_N = samples[:, :-1].ravel(), samples[:, 1:].ravel()
    per_byte = targets_N.size / bytes_V[targets_N].sum() / math.log(2)
    return {
        "unigram": fitted.unigram_nats(targets_N) * per_byte,
        "bigram": fitted.bigram_nats(contexts_N, targets_N) * per_byte,
    }


def show(rows: dict[str, float], tokens: int) -> None:
    """The table for a person."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"bits per byte on {tokens:,} tokens of the test split")
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    table.add_column("against the bigram", justify="right")
    for name, bits in rows.items():
        table.add_row(name, f"{bits:.4f}", f"{bits / rows['bigram'] - 1:+.1%}")
    Console().print(table)


if __name__ == "__main__":
    run_tool(main)
