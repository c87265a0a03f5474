"""The optional ways to score of ``mhr evaluate``: overlapping windows, and rescaled outputs for small k."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

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
        eod=run.eod(tokenizer),
        tokenizer=tokenizer.identity(),
    )
    return strided(builder, args.split or "test", args.eval_stride)


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
