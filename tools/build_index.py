"""Build the index files of a run ahead of it, away from the cluster: the run finds them and starts at once.

Takes the flags of pretrain_gpt_hyperrouter.py; only those about data, seed, sequence length, batch size and steps matter.
Files lie in --data-cache-path, or else in cache/hyperrouter beside the data; they hold for token files of the same time of change.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from _common import parser, run_tool


def main(arguments: Sequence[str]) -> None:
    """Read the flags, build, say what was built."""
    flags = parser(__doc__ or "", epilog="all other flags: python pretrain_gpt_hyperrouter.py --help")
    flags.add_argument("--config", metavar="FILE", help="YAML file of the run")
    flags.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks of the run; matters without --global-batch-size")
    args, others = flags.parse_known_args(arguments)

    from megatron_hyperrouter.config.cli import parse
    from megatron_hyperrouter.data.cache import Cache
    from megatron_hyperrouter.data.dataset import build_splits
    from megatron_hyperrouter.routers import ROUTERS
    from megatron_hyperrouter.train.loop import samples_needed

    config = parse([*(["--config", args.config] if args.config else []), *others], routers=ROUTERS)
    cache = Cache(config.data.data_cache_path)
    begin = time.monotonic()
    splits = build_splits(
        config.data,
        seq_length=config.model.seq_length,
        seed=config.train.seed,
        vocab_size=2**31,  # no token is read
        eod=0,
        cache=cache,
        **samples_needed(config, max(args.world_size, 1)),
    )
    for name in ("train", "valid", "test"):
        dataset = getattr(splits, name)
        print(f"{name + ':':<7} {'no samples' if dataset is None else f'{len(dataset):,} samples'}")
    for path in dict.fromkeys(cache.used):
        print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")
    if not cache.used:
        print("no index file is needed: what is small, or looked up on demand, is made by each process in no time")
    print(f"{time.monotonic() - begin:.1f} s")


if __name__ == "__main__":
    run_tool(main)
