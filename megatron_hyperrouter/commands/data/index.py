"""Build the index files of a run in advance, on any machine that can read the data.

The index files contain the order of the samples; with them, the run starts faster.  The command accepts all
flags of mhr train.  It uses the flags for data, seed, sequence length, batch size and steps, and --load if
the run resumes.  The index files go to --data-cache-path.  Without this flag they go to cache/hyperrouter
next to the data, or, if the data folder is not writable, to index-cache in --run-dir.  The run looks for them
in the same places.  An index is rebuilt when the modification time of a token file changes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.terminal import parser

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.data.order.index_files import IndexCache
    from megatron_hyperrouter.data.stream.dataset import Splits


def main(arguments: Sequence[str]) -> None:
    """Read the flags, build, and report what was built."""
    flags = parser(__doc__ or "", epilog="mhr train --help explains all other flags.")
    flags.add_argument("--config", metavar="FILE", help="YAML file with the settings of the run")
    flags.add_argument(
        "--world-size",
        type=int,
        default=1,
        metavar="N",
        help="number of ranks of the run; only needed if --global-batch-size is not set (default: 1)",
    )
    args, others = flags.parse_known_args(arguments)
    flags.check_at_least(args, 1, "world_size")

    from megatron_hyperrouter.config.cli import parse
    from megatron_hyperrouter.data.order.index_files import IndexCache
    from megatron_hyperrouter.errors import DataError
    from megatron_hyperrouter.paths import unexpanded
    from megatron_hyperrouter.routers import ROUTERS

    class Counting(IndexCache):
        """Counts the requested files.  If a file cannot be written, its index exists only in this process and
        does not help the run.
        """

        asked = 0

        def arrays(self, *key: Any, numbers: int, **how: Any) -> Any:
            self.asked += numbers >= self.cached_from
            return super().arrays(*key, numbers=numbers, **how)

    file = ["--config", unexpanded(args.config)] if args.config else []
    config = parse([*file, *others], routers=ROUTERS)
    cache = Counting(config.data.data_cache_path, fallback=f"{config.logging.run_dir}/index-cache")
    begin = time.monotonic()
    splits = build(config, cache, world_size=args.world_size)
    for name in ("train", "valid", "test"):
        dataset = getattr(splits, name)
        print(f"{name + ':':<7} {'no samples' if dataset is None else f'{len(dataset):,} samples'}")
    for path in dict.fromkeys(cache.used):
        print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")
    if len(cache.used) < cache.asked:
        raise DataError(
            f"{cache.asked - len(cache.used)} of {cache.asked} index files could not be written",
            remedy="give a writable folder with --data-cache-path, both here and in mhr train",
        )
    if not cache.used:
        print("no index file is needed: each process of the run computes the order of these samples itself")
    print(f"{time.monotonic() - begin:.1f} s")


def build(config: RunConfig, cache: IndexCache, *, world_size: int) -> Splits:
    """The datasets that the program would build with these settings."""
    from megatron_hyperrouter.train.resuming.start import decide
    from megatron_hyperrouter.train.samples import open_samples

    start = decide(config)
    # The vocabulary does not matter: no token is read.
    return open_samples(
        config,
        vocab_size=2**31,
        eod=0,
        cache=cache,
        world_size=world_size,
        ledger=start.ledger,
        step=start.step,
    ).splits
