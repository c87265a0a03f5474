"""Score a trained model at several k: what routing each token to fewer or more experts costs.

Writes {"results": [{"topk", "lm_loss", "perplexity", "bits_per_byte", "tokens"}, ...]} to --output and a
table to stdout. Runs in one process, or under torchrun or deepspeed on several ranks.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import parser, run_tool

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import DataConfig, RunConfig
    from megatron_hyperrouter.data.dataset import Dataset
    from megatron_hyperrouter.train.metrics import Record

LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)


def main(arguments: Sequence[str]) -> None:
    """Settings of the run -> data -> model -> one loss for each k."""
    args = read_flags(arguments)
    import torch

    from megatron_hyperrouter.checkpoint.folder import read_manifest, verify
    from megatron_hyperrouter.config.cli import launched_world_size
    from megatron_hyperrouter.config.derived import data_parallel_size, minds_documents
    from megatron_hyperrouter.data.tokenizer import build_tokenizer
    from megatron_hyperrouter.engines import open_engine
    from megatron_hyperrouter.evaluate.perplexity import check_topks, loss_by_topk
    from megatron_hyperrouter.train.metrics import to_json

    folder = checkpoint_of(args.load)
    manifest = read_manifest(folder)
    config = settings_of(folder, world_size=launched_world_size())
    check_topks(args.topk, config.model.num_experts)
    tokenizer = build_tokenizer(
        config.data.tokenizer_type, config.data.tokenizer_model, config.data.vocab_size
    )
    samples = args.eval_iters and args.eval_iters * manifest["meta"]["order"]["global_batch_size"]
    eod = tokenizer.eod if minds_documents(config) else None
    dataset = dataset_of(config, args, vocab_size=tokenizer.vocab_size, samples=samples, eod=eod)
    ranks = data_parallel_size(config, launched_world_size())
    micro_batch_size = min(config.train.micro_batch_size, max(len(dataset) // ranks, 1))
    bytes_V = tokenizer.token_bytes_V()
    engine = open_engine(config, vocab_size=tokenizer.vocab_size, eod=eod, for_training=False)
    try:
        verify(folder, engine)
        engine.load(folder, weights_only=True)
        results = loss_by_topk(
            engine,
            dataset,
            args.topk,
            micro_batch_size=micro_batch_size,
            num_batches=samples and max(samples // (micro_batch_size * ranks), 1),
            token_bytes_V=None if bytes_V is None else torch.from_numpy(bytes_V),
        )
        if engine.place.is_main:
            rows = ", ".join(to_json(result) for result in results)
            head = {
                "checkpoint": str(folder),
                "step": manifest["step"],
                "data": args.data_path,
                "split": args.split,
            }
            show(results)
            write(args.output, json.loads(f'{{"results": [{rows}]}}') | head)
    finally:
        engine.close()


def read_flags(arguments: Sequence[str]) -> Namespace:
    """The flags; a wrong one ends with status 2."""
    flags = parser(__doc__ or "")
    flags.add_argument(
        "--load",
        type=Path,
        required=True,
        metavar="RUN_DIR",
        help="run folder, its checkpoints/, or one checkpoint",
    )
    flags.add_argument(
        "--topk", type=int, nargs="+", required=True, metavar="K", help="active experts, one or several"
    )
    flags.add_argument(
        "--data-path",
        nargs="+",
        metavar="P",
        help="other data: all of it, or the --split of it that is named",
    )
    flags.add_argument(
        "--split", choices=("train", "valid", "test"), help="which part of the data (default: test)"
    )
    flags.add_argument(
        "--eval-iters",
        type=int,
        metavar="N",
        help="global batches of the run, as in training (default: the whole split)",
    )
    flags.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="where the results go")
    args = flags.parse_args(arguments)
    if args.eval_iters is not None and args.eval_iters < 1:
        flags.error("--eval-iters must be at least 1")
    return args


def checkpoint_of(load: Path) -> Path:
    """The checkpoint that ``--load`` means."""
    from megatron_hyperrouter.checkpoint.folder import find
    from megatron_hyperrouter.errors import CheckpointError

    folder = find(load)
    if folder is None:
        raise CheckpointError(
            f"--load {load}: there is no finished checkpoint",
            remedy="name the --run-dir of a run that has saved one",
        )
    return folder


def settings_of(folder: Path, *, world_size: int) -> RunConfig:
    """The settings of the run that wrote a checkpoint: its layout where it fits these ranks, else
    data-parallel ranks alone.
    """
    from megatron_hyperrouter.config.cli import load_file
    from megatron_hyperrouter.errors import CheckpointError, ConfigError
    from megatron_hyperrouter.routers import ROUTERS

    path = folder.parent.parent / "config.yaml"
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: it says what model {folder} holds", remedy="put the run's config.yaml there"
        )
    # What only training needs must not stand in the way.
    neutral: dict[str, object] = {
        "load": None,
        "global_batch_size": None,
        "deepspeed_config": None,
        "recompute_granularity": None,
    }
    neutral |= {
        "moe_token_dispatcher_type": "alltoall",
        "transformer_impl": "auto",
    }  # others give the same, and may want GPUs
    if world_size > 1:
        try:
            return load_file(path, routers=ROUTERS, overrides=neutral, world_size=world_size)
        except ConfigError:
            pass
    alone = dict.fromkeys(LAYOUT, 1) | {
        "virtual_pipeline_model_parallel_size": None,
        "expert_tensor_parallel_size": None,
    }
    return load_file(
        path, routers=ROUTERS, overrides=neutral | alone | {"sequence_parallel": False}, world_size=world_size
    )


def dataset_of(
    config: RunConfig, args: Namespace, *, vocab_size: int, samples: int | None, eod: int | None = None
) -> Dataset:
    """The split to score: ``samples`` of it, or all of it."""
    from megatron_hyperrouter.data.dataset import build_splits
    from megatron_hyperrouter.errors import DataError

    split = args.split or "test"
    data = data_of(config, args)
    wanted: dict[str, Any] = {f"{name}_samples": 0 for name in ("train", "valid", "test")} | {
        f"{split}_samples": samples
    }
    sizes = {"seq_length": config.model.seq_length, "vocab_size": vocab_size}
    splits = build_splits(data, seed=config.train.seed, eod=eod, **sizes, **wanted)
    dataset: Dataset | None = getattr(splits, split)
    if dataset is None:
        raise DataError(
            f"the {split} split has no documents",
            remedy="name another one with --split, or other data with --data-path",
        )
    return dataset


def data_of(config: RunConfig, args: Namespace) -> DataConfig:
    """The run's data, or that of ``--data-path``; a whole split has no use for the weights of a blend."""
    from dataclasses import replace

    from megatron_hyperrouter.data.blend import parse_blend

    fields = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
    paths: dict[str, Any] = {name: getattr(config.data, name) for name in fields}
    if args.data_path is not None:
        given = (
            ("data_path",) if args.split else ("train_data_path", "test_data_path")
        )  # a part of it, or all of it
        paths = {name: tuple(args.data_path) if name in given else () for name in fields}
    if args.eval_iters is None:
        paths = {
            name: tuple(parse_blend(words, flag=f"--{name.replace('_', '-')}").prefixes) if words else ()
            for name, words in paths.items()
        }
    return replace(config.data, **paths)


def write(path: Path, content: object) -> None:
    """Write JSON under a temporary name, then rename: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(unfinished, path)


def show(results: Sequence[Record]) -> None:
    """A table for a person."""
    print(f"{'k':>4} {'loss':>9} {'perplexity':>11} {'bits/byte':>10} {'tokens':>12}")
    for row in results:
        bits = "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        print(
            f"{row['topk']:>4} {row['lm_loss']:>9.4f} {row['perplexity']:>11.3f} {bits:>10} "
            f"{row['tokens']:>12,}"
        )


if __name__ == "__main__":
    run_tool(main)
