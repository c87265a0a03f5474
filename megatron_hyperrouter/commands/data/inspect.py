"""Describe a pair of token files (.bin and .idx)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_hyperrouter.commands.data.tokenizer_flags import add_tokenizer_flags, tokenizer_options
from megatron_hyperrouter.terminal import Bar, parser


def main(arguments: Sequence[str]) -> None:
    """Read the flags, describe the files on stdout."""
    from megatron_hyperrouter.data.tokenize.describe import describe
    from megatron_hyperrouter.data.tokenize.tokenizer import tokenizer_from

    flags = parser(__doc__ or "")
    flags.add_argument("prefix", metavar="P", help="path of the files, without .bin or .idx")
    add_tokenizer_flags(flags, required=False)
    flags.add_argument(
        "--tokens",
        type=int,
        default=64,
        metavar="N",
        help="number of tokens to show, from the beginning (default: 64)",
    )
    flags.add_argument(
        "--verify",
        action="store_true",
        help=(
            "compare counts, sizes and checksums of the files with P.manifest.json; a difference "
            "gives exit status 3"
        ),
    )
    args = flags.parse_args(arguments)
    tokenizer = tokenizer_from(tokenizer_options(args)) if args.tokenizer_type else None
    with Bar("mhr inspect") as bar:
        found = describe(
            args.prefix, num_first=args.tokens, tokenizer=tokenizer, verify=args.verify, progress=bar.update
        )
    for name, value in found.items():
        print(f"{name + ':':<18} {value}")
