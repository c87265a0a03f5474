"""A pair of token files in words and numbers."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from megatron_hyperrouter.data.store.manifest import (
    compare,
    described,
    file_sum,
    manifest_of,
    read_manifest,
    same_tokenizer,
)
from megatron_hyperrouter.data.store.pair_writer import FileSum
from megatron_hyperrouter.data.store.token_files import IndexedDataset
from megatron_hyperrouter.data.tokenize.tokenizer import Tokenizer
from megatron_hyperrouter.errors import ConfigError, DataError, Problem


def describe(
    prefix: str,
    *,
    num_first: int = 64,
    tokenizer: Tokenizer | None = None,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Names and values, in the order in which to show them.

    ``prefix``: with or without .bin or .idx.  ``num_first``: number of tokens to show; with a
    ``tokenizer`` also as text. Lengths are those of documents, in tokens.  ``verify``: compare everything
    with the manifest next to the files. ``progress(bytes, all bytes)`` reports reading for the checksums.

    ConfigError for a negative number.  DataError for files that are unusable, differ from their manifest,
    or contain ids that the tokenizer does not have.
    """
    if num_first < 0:
        raise ConfigError([Problem("--tokens", num_first, "must be at least 0", "use 0 to show no tokens")])
    root, ending = os.path.splitext(prefix)
    prefix = root if ending in (".bin", ".idx") else prefix
    manifest = read_manifest(prefix) if verify else None
    summed = _Summed(prefix, progress)
    sums = {name: summed.of(name) for name in (("bin", "idx") if manifest else ())}
    if manifest:  # before the index is read: the checksum shows a damaged file
        compare(prefix, manifest, {}, sums)
    data = IndexedDataset(prefix)
    ends = np.concatenate([[0], np.cumsum(data.sizes, dtype=np.int64)])[data.document_indices]
    lengths = np.diff(ends)
    first = data.tokens[:num_first]
    found = {
        "documents": f"{lengths.size:,}",
        "sequences": f"{len(data):,}",
        "tokens": f"{data.num_tokens:,}",
        "dtype": data.dtype.name,
        "lengths": "none"
        if not lengths.size
        else f"min {lengths.min():,}, median {np.median(lengths):,.1f}, max {lengths.max():,}",
        "empty documents": f"{int((lengths == 0).sum()):,}",
        **{f"sha256 .{name}": (sums.get(name) or summed.of(name)).sha256 for name in ("bin", "idx")},
        "first tokens": " ".join(map(str, first.tolist())),
    }
    if manifest:
        counts = {
            "documents": lengths.size,
            "sequences": len(data),
            "tokens": data.num_tokens,
            "dtype": data.dtype.name,
        }
        compare(prefix, manifest, counts, {})
        found["manifest"] = "verified: counts, sizes and checksums match the files"
    if tokenizer is not None:
        known = manifest or manifest_of(prefix)  # the ids of another tokenizer would give a wrong text
        if known is not None and not same_tokenizer(known.tokenizer, tokenizer.identity()):
            message = (
                f"{prefix}: the data were made with the tokenizer {described(known.tokenizer)}, "
                f"not with {described(tokenizer.identity())}"
            )
            raise DataError(message, remedy="use the tokenizer that made the data")
        for extreme in (first.max(initial=0), first.min(initial=0)):
            if 0 <= extreme < tokenizer.vocab_size:
                continue
            message = (
                f"{data.bin_path}: token id {extreme} is outside the tokenizer's vocabulary of "
                f"{tokenizer.vocab_size} ids"
            )
            raise DataError(message, remedy="use the tokenizer that made the data")
        found["first text"] = repr(tokenizer.decode(first.tolist()))
    return found


class _Summed:
    """Checksums of a pair, with progress: those of a large corpus take an hour."""

    def __init__(self, prefix: str, progress: Callable[[int, int], None] | None) -> None:
        self._prefix, self._progress, self._done = prefix, progress, 0
        paths = (f"{prefix}.{name}" for name in ("bin", "idx"))
        self._total = sum(os.path.getsize(path) for path in paths if os.path.exists(path))

    def of(self, name: str) -> FileSum:
        """The one of ``.bin`` or ``.idx``."""
        return file_sum(f"{self._prefix}.{name}", self._count_read)

    def _count_read(self, count: int) -> None:
        self._done += count
        if self._progress:
            self._progress(self._done, self._total)
