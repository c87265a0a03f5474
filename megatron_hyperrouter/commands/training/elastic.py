"""``--elastic``: a run continues on fewer or more ranks.

Tensor, pipeline, context and expert parallelism stay as set, and so does the global batch size.  The
number of data-parallel ranks is the number of copies of the model, and the micro-batch size follows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.checkpoint.folder import find, read_manifest
from megatron_hyperrouter.config.check import problems
from megatron_hyperrouter.config.cli import parse, replace_leaves
from megatron_hyperrouter.config.derived import data_parallel_size, model_parallel_size
from megatron_hyperrouter.config.reading.sources import CommandLine, read_flags, read_given_yaml
from megatron_hyperrouter.errors import CheckpointError, ConfigError, Problem
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.train.resuming.start import is_restarted

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig

_CHOSEN = ("--micro-batch-size", "--global-batch-size")


def laid_out_anew(words: Sequence[str], world_size: int, notes: list[str]) -> list[str]:
    """The command line for this many ranks; unchanged if it has no ``--elastic``.  Raises ConfigError."""
    line = read_flags(words)
    if line.problems or {"--help"} & set(line.flags):
        return list(words)
    try:
        config = parse(words, routers=ROUTERS, world_size=None)
    except ConfigError:
        if _asks(line):  # on these ranks the settings may be valid, but not elastic
            raise
        return list(words)  # it is raised again, with the rules of ranks
    if not config.checkpoint.elastic:
        return list(words)
    before = _saved(config)
    given = config.train.global_batch_size or before.get("global_batch_size")
    fitted = _fitted(config, given, world_size)
    if fitted is None:
        raise ConfigError([_no_layout(config, given, world_size)])
    ranks, batch, micro = fitted
    notes += _said(config, before, (world_size, ranks, batch, micro))
    kept = [word for name, values in line.flags.items() if name not in _CHOSEN for word in (name, *values)]
    return [*kept, _CHOSEN[0], str(micro), _CHOSEN[1], str(batch)]


def _asks(line: CommandLine) -> bool:
    """Whether the flags, or else the settings file, ask for ``--elastic``."""
    if (words := line.flags.get("--elastic")) is not None:
        return [word.lower() for word in words] != ["false"]
    if "--no-elastic" in line.flags or len(path := line.flags.get("--config", [])) != 1:
        return False
    return read_given_yaml(path[0]).values.get("elastic") is True


def _saved(config: RunConfig) -> dict[str, Any]:
    """Batch and ranks of the checkpoint that the run continues from; empty for a new run."""
    load = config.checkpoint.load or (
        config.logging.run_dir if is_restarted(config.logging.run_dir) else None
    )
    if load is None:
        return {}
    try:
        folder = find(Path(load))
        meta = {} if folder is None else read_manifest(folder)["meta"]
    except CheckpointError:
        return {}  # it is raised again where the checkpoint is loaded
    return {**meta.get("layout", {}), **meta.get("order", {})}


def _fitted(config: RunConfig, given: int | None, world_size: int) -> tuple[int, int, int] | None:
    """Data-parallel ranks, global batch (``given``, if any) and micro-batch; None if they cannot run."""
    ranks = data_parallel_size(config, world_size)
    batch = given or config.train.micro_batch_size * ranks
    if not ranks or batch % ranks:
        return None
    micro = math.gcd(batch // ranks, config.train.micro_batch_size)
    laid_out = replace_leaves(config, micro_batch_size=micro, global_batch_size=batch)
    return None if problems(laid_out, world_size=world_size) else (ranks, batch, micro)


def _no_layout(config: RunConfig, batch: int | None, world_size: int) -> Problem:
    """The problem to report; its remedy names numbers of ranks that work."""
    usable = [count for count in range(1, 2 * world_size + 1) if _fitted(config, batch, count)]
    fewer = [count for count in usable if count < world_size]
    more = [count for count in usable if count > world_size]
    near = [*fewer[-1:], *more[:1]]
    rule = (
        "cannot be used with --elastic: the number of ranks must be a multiple of the "
        f"model-parallel size = {model_parallel_size(config)} and of the expert-parallel size, and "
        "the data-parallel size must divide the global batch"
    ) + (f" of {batch} samples" if batch else "")
    remedy = f"start {' or '.join(map(str, near))} ranks" if near else "change the layout"
    return Problem("ranks started", world_size, rule, remedy)


def _said(config: RunConfig, before: dict[str, Any], now: tuple[int, int, int, int]) -> list[str]:
    world_size, ranks, batch, micro = now
    was = before.get("world_size")
    head = f"--elastic: the run has {world_size} ranks" + (
        f" instead of {was}" if was not in (None, world_size) else ""
    )
    lines = [
        f"{head}; data-parallel size = {ranks}, micro-batch size = {micro}, micro-batches per rank in "
        f"each step = {batch // (ranks * micro)}; the global batch size stays {batch}"
    ]
    if micro != config.train.micro_batch_size:
        lines.append(
            f"--elastic: the micro-batch size is {micro} instead of {config.train.micro_batch_size}; "
            "router losses change slightly, because they are averaged over micro-batches"
        )
    return lines
