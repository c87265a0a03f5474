"""The optional ways to score of ``mhr evaluate``: overlapping windows, and rescaled outputs for small k."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.console import note

if TYPE_CHECKING:
    from megatron_hyperrouter.data.stream.dataset import Dataset
    from megatron_hyperrouter.data.stream.strided import StridedDataset
    from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer
    from megatron_hyperrouter.engines.base import Engine
    from megatron_hyperrouter.evaluate.trained import TrainedRun


def windows_of(run: TrainedRun, tokenizer: Tokenizer, args: Namespace) -> StridedDataset:
    """The split as windows that overlap."""
    from megatron_hyperrouter.data.order.index_files import IndexCache
    from megatron_hyperrouter.data.stream.dataset import Builder
    from megatron_hyperrouter.data.stream.strided import strided

    data = run.data(split=args.split, data_path=args.data_path)
    builder = Builder(
        data,
        run.settings.model.seq_length,
        run.settings.train.seed,
        tokenizer.vocab_size,
        IndexCache(data.data_cache_path),
        tokenizer=tokenizer.identity(),
    )
    return strided(builder, args.split or "test", args.eval_stride)


def batches_of(run: TrainedRun, args: Namespace, *, most: int) -> int | None:
    """The samples of ``--eval-iters`` global batches; None if those are all ``most`` samples or more."""
    wanted = args.eval_iters and args.eval_iters * run.global_batch_size
    if wanted and wanted > most:
        note(
            f"--eval-iters {args.eval_iters} selects {wanted:,} samples, but there are {most:,}; "
            "scoring each of them once"
        )
    return wanted if wanted and wanted < most else None


def selected(run: TrainedRun, tokenizer: Tokenizer, args: Namespace) -> tuple[Dataset, int | None]:
    """The split, and how many of its samples to score; None: all.

    For training data, which are read for many epochs, the number of different samples is not computed.
    """
    each_once = partial(run.dataset, tokenizer, split=args.split, data_path=args.data_path)
    if args.eval_iters and args.split == "train":
        wanted = args.eval_iters * run.global_batch_size
        return each_once(samples=wanted), wanted
    whole = each_once(samples=None)
    samples = batches_of(run, args, most=len(whole))
    return (whole, None) if samples is None else (each_once(samples=samples), samples)


def refuse_several_ranks(world_size: int) -> None:
    """Raises ConfigError for several ranks: the scales are computed from the outputs of all experts."""
    from megatron_hyperrouter.errors import ConfigError, Problem

    if world_size > 1:
        rule = f"needs exactly one process, but {world_size} were started"
        raise ConfigError([Problem("--calibrate-k", "", rule, "start the command without a launcher")])


def calibrated_results(
    run: TrainedRun,
    engine: Engine,
    tokenizer: Tokenizer,
    dataset: Dataset,
    args: Namespace,
    samples: int | None,
) -> list[dict[str, Any]]:
    """The scores with one scale for each layer, from the first micro-batch of the run's training data."""
    import torch

    from megatron_hyperrouter.evaluate.calibration import apply, scales_of
    from megatron_hyperrouter.evaluate.perplexity import loss_by_topk

    bytes_V = tokenizer.token_bytes_V()
    routers = list(engine.routers.values())
    rows = []
    for topk in args.topk:
        factors = scales_of(run, engine, tokenizer, topk)
        with apply(routers, factors):
            (row,) = loss_by_topk(
                engine,
                dataset,
                [topk],
                micro_batch_size=min(run.settings.train.micro_batch_size, len(dataset)),
                num_samples=samples,
                token_bytes_V=None if bytes_V is None else torch.from_numpy(bytes_V),
                unscored=getattr(dataset, "unscored", None),
            )
        rows.append({**row, "scales": [factors[layer] for layer in sorted(factors)]})
    return rows
