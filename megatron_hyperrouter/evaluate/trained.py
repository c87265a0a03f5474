"""A trained run as a value: its checkpoint, its settings and the data to score it on."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import DataConfig, RunConfig
    from megatron_hyperrouter.data.stream.dataset import Dataset


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
    from megatron_hyperrouter.config.by_role import quiet
    from megatron_hyperrouter.config.cli import load_file
    from megatron_hyperrouter.config.roles import Role
    from megatron_hyperrouter.errors import CheckpointError, ConfigError
    from megatron_hyperrouter.routers import ROUTERS

    path = folder.parent.parent / "config.yaml"
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: it says what model {folder} holds", remedy="put the run's config.yaml there"
        )
    # What only training needs must not stand in the way; other ways to compute the same may want GPUs.
    neutral = quiet(Role.START, Role.BATCH, Role.SPEED)
    if world_size > 1:
        try:
            return load_file(path, routers=ROUTERS, overrides=neutral, world_size=world_size)
        except ConfigError:
            pass
    alone = neutral | quiet(Role.LAYOUT)
    return load_file(path, routers=ROUTERS, overrides=alone, world_size=world_size)


def dataset_of(
    config: RunConfig, args: Namespace, *, vocab_size: int, samples: int | None, eod: int | None = None
) -> Dataset:
    """The split to score: ``samples`` of it, or all of it."""
    from megatron_hyperrouter.data.stream.dataset import build_splits
    from megatron_hyperrouter.errors import DataError

    split = args.split or "test"
    data = data_of(config, args)
    wanted: dict[str, Any] = {f"{name}_samples": 0 for name in ("train", "valid", "test")} | {
        f"{split}_samples": samples
    }
    sizes: dict[str, Any] = {"seq_length": config.model.seq_length, "vocab_size": vocab_size}
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

    from megatron_hyperrouter.data.order.blend import parse_blend

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
