"""Merge the shards that mhr preprocess --shard I/N wrote on several machines."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_hyperrouter.terminal import Bar, counted, parser

EPILOG = """\
The command reads P.shard-I-of-N_KEY_document.bin, .idx and .manifest.json for I = 1 to N and each KEY, and
compares the files with the checksums in the manifests.  It writes P_KEY_document.bin, .idx and
.manifest.json.  A single run over all inputs would write the same files, byte for byte."""


def main(arguments: Sequence[str]) -> None:
    """Read the flags, merge, and report what was written."""
    from megatron_hyperrouter.data.tokenize.merge import merge

    flags = parser(__doc__ or "", EPILOG)
    flags.add_argument(
        "prefix",
        metavar="P",
        help="value of --output-prefix in the mhr preprocess commands on all machines",
    )
    flags.add_argument("--remove-shards", action="store_true", help="delete the shards after they are merged")
    args = flags.parse_args(arguments)
    with Bar("mhr merge") as bar:
        written = merge(args.prefix, remove_shards=args.remove_shards, progress=bar.update)
    for pair in written:
        sizes = f"{counted(pair.documents, 'document')}, {counted(pair.tokens, 'token')}"
        print(f"{pair.prefix}: {sizes}, {pair.dtype.name}", file=sys.stderr)
