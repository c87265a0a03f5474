"""Join the shards that mhr preprocess --shard I/N has made on several machines."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_hyperrouter.terminal import Bar, counted, parser

EPILOG = """\
Reads P.shard-I-of-N_KEY_document.bin, .idx and .manifest.json for I = 1 .. N and each KEY, and writes
P_KEY_document.*, byte for byte what one run over all inputs writes.  Checksums are compared with the
manifests on the way. """


def main(arguments: Sequence[str]) -> None:
    """Read the flags, merge, say what was written."""
    from megatron_hyperrouter.data.tokenize.merge import merge

    flags = parser(__doc__ or "", EPILOG)
    flags.add_argument(
        "prefix", metavar="P", help="the --output-prefix that was given to mhr preprocess on each machine"
    )
    flags.add_argument("--remove-shards", action="store_true", help="remove the shards once all is joined")
    args = flags.parse_args(arguments)
    with Bar("mhr merge") as bar:
        written = merge(args.prefix, remove_shards=args.remove_shards, progress=bar.update)
    for pair in written:
        sizes = f"{counted(pair.documents, 'document')}, {counted(pair.tokens, 'token')}"
        print(f"{pair.prefix}: {sizes}, {pair.dtype.name}", file=sys.stderr)
