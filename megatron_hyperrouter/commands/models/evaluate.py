"""Score a trained run at several k: how does the loss change if each token uses fewer or more experts?

The command writes {"results": [{"topk", "lm_loss", "perplexity", "bits_per_byte", "tokens"}, ...]} to
--output and a table to stdout.  Perplexity is per token.  If the manifests of the data
(P_KEY_document.manifest.json) count words, "word_perplexity" gives the perplexity per word for each k.  The
command runs in one process, or on several ranks under torchrun or deepspeed.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.commands.models.evaluate_ways import (
    calibrated_results,
    refuse_several_ranks,
    windows_of,
)
from megatron_hyperrouter.evaluate.selection import at_most, first_batches
from megatron_hyperrouter.evaluate.trained import TrainedRun, add_run_flags, checkpoint_of
from megatron_hyperrouter.files import check_output, write_json
from megatron_hyperrouter.terminal import Bar, parser

if TYPE_CHECKING:
    from megatron_hyperrouter.data.stream.dataset import Dataset, Sample
    from megatron_hyperrouter.train.metrics import Record
    from megatron_hyperrouter.train.resuming.start import Start


def main(arguments: Sequence[str]) -> None:
    """Settings of the run -> data -> model -> one loss for each k."""
    args = read_flags(arguments)
    import torch

    from megatron_hyperrouter.config.cli import launched_world_size
    from megatron_hyperrouter.evaluate.perplexity import check_topks, loss_by_topk
    from megatron_hyperrouter.evaluate.words import word_perplexity, words_per_token
    from megatron_hyperrouter.guard.meeting import Meeting
    from megatron_hyperrouter.guard.ranks import adopt_ranks
    from megatron_hyperrouter.train.metrics import to_json
    from megatron_hyperrouter.train.resuming.together import follow_rank_0

    adopt_ranks()
    meeting = Meeting.of_this_process()
    load = follow_rank_0(lambda: found(args), meeting).folder
    assert load is not None
    run = TrainedRun.open(load, world_size=launched_world_size(), tokenizer_model=args.tokenizer_model)
    check_topks(args.topk, run.settings.model.num_experts, router=run.settings.router)
    if args.calibrate_k:
        refuse_several_ranks(launched_world_size())
    tokenizer = run.tokenizer()
    dataset: Any
    unscored = None
    if args.eval_stride is None:
        dataset, samples = first_batches(
            run, tokenizer, args.eval_iters, split=args.split, data_path=args.data_path, flag="--eval-iters"
        )
    else:
        dataset = windows_of(run, tokenizer, args)
        samples = at_most(run, args.eval_iters, most=len(dataset), flag="--eval-iters")
        unscored = dataset.unscored
    bytes_V = tokenizer.token_bytes_V()
    engine = run.open_engine(tokenizer)
    try:
        run.load_into(engine)
        with Bar("evaluate", "samples") as bar:
            scored = min(len(dataset), samples or len(dataset)) * len(args.topk)
            results = loss_by_topk(
                engine,
                Counted(dataset, bar, scored // engine.place.data_size) if engine.place.is_main else dataset,
                args.topk,
                micro_batch_size=min(run.settings.train.micro_batch_size, len(dataset)),
                num_samples=samples,
                token_bytes_V=None if bytes_V is None else torch.from_numpy(bytes_V),
                unscored=unscored,
            )
        ratio = words_per_token(run.data(split=args.split, data_path=args.data_path), args.split or "test")
        calibrated = (
            calibrated_results(run, engine, tokenizer, dataset, args, samples) if args.calibrate_k else None
        )
        if engine.place.is_main:
            rows = ", ".join(to_json(result) for result in results)
            head: dict[str, Any] = {
                "checkpoint": str(run.checkpoint),
                "step": run.step,
                "data": args.data_path,
                "split": args.split,
                "eval_stride": args.eval_stride,
            }
            if ratio is not None:
                head["word_perplexity"] = {
                    str(row["topk"]): word_perplexity(float(row["lm_loss"] or 0.0), ratio) for row in results
                }
            show(results)
            if calibrated is not None:
                head["calibrated"] = calibrated
                print("with rescaled MoE outputs (--calibrate-k):")
                show(calibrated)
            write_json(args.output, json.loads(f'{{"results": [{rows}]}}') | head)
    finally:
        engine.close()


def found(args: Namespace) -> Start:
    """The checkpoint that ``--load`` refers to, as this rank sees it; ConfigError if the results cannot be
    written.
    """
    from megatron_hyperrouter.checkpoint.folder import read_manifest
    from megatron_hyperrouter.train.resuming.start import Start

    check_output(args.output)
    folder = checkpoint_of(args.load)
    return Start(folder, read_manifest(folder))


class Counted:
    """A dataset that shows on a progress bar how many of ``total`` samples were read."""

    def __init__(self, dataset: Dataset, bar: Bar, total: int) -> None:
        self._dataset, self._bar, self._total, self._read = dataset, bar, total, 0

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._dataset)

    def __getitem__(self, i: int) -> Sample:
        """Sample ``i``."""
        self._read += 1
        self._bar.update(min(self._read, self._total), self._total)
        return self._dataset[i]


def read_flags(arguments: Sequence[str]) -> Namespace:
    """The flags; a wrong one ends with status 2."""
    flags = parser(__doc__ or "")
    add_run_flags(flags)
    flags.add_argument(
        "--topk",
        type=int,
        nargs="+",
        required=True,
        metavar="K",
        help="values of k (active experts per token) at which to score the model",
    )
    flags.add_argument(
        "--split", choices=("train", "valid", "test"), help="split of the data to score (default: test)"
    )
    flags.add_argument(
        "--eval-iters",
        type=int,
        metavar="N",
        help="number of batches to score, each with the global batch size of the run (default: the "
        "whole split)",
    )
    flags.add_argument(
        "--eval-stride",
        type=int,
        metavar="S",
        help="score overlapping windows: each window starts S tokens after the previous window, and "
        "only the last S tokens of a window are scored. Each scored token then has a long "
        "context (default: no overlap)",
    )
    flags.add_argument(
        "--calibrate-k",
        action="store_true",
        help="also score the model with each MoE layer's output rescaled to the root mean square "
        "that it has at the final k of training (measured on one training batch); the JSON file "
        'has these scores in "calibrated"',
    )
    flags.add_argument(
        "--output", type=Path, required=True, metavar="FILE.json", help="JSON file to write the results to"
    )
    args = flags.parse_args(arguments)
    flags.check_at_least(args, 1, "eval_iters")
    return args


def show(results: Sequence[Record]) -> None:
    """A table for the terminal."""
    print(f"{'k':>4} {'loss':>9} {'perplexity':>11} {'bits/byte':>10} {'tokens':>12}")
    for row in results:
        bits = "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        print(
            f"{row['topk']:>4} {row['lm_loss']:>9.4f} {row['perplexity']:>11.3f} {bits:>10} "
            f"{row['tokens']:>12,}"
        )
