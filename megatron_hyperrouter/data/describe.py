"""A pair of token files in words and numbers."""

from __future__ import annotations

import hashlib
import os

import numpy as np

from megatron_hyperrouter.data.store import IndexedDataset
from megatron_hyperrouter.data.tokenizer import Tokenizer
from megatron_hyperrouter.errors import DataError

_BLOCK = 1 << 20


def describe(prefix: str, *, num_first: int = 64, tokenizer: Tokenizer | None = None) -> dict[str, str]:
    """Names and values, in the order in which to show them.

    ``prefix``: with or without .bin or .idx.  ``num_first``: tokens to show; with a ``tokenizer`` also as text.
    Lengths are those of documents, in tokens.  DataError for files that are unusable, or hold ids that the tokenizer has not.
    """
    root, ending = os.path.splitext(prefix)
    data = IndexedDataset(root if ending in (".bin", ".idx") else prefix)
    ends = np.concatenate([[0], np.cumsum(data.sizes, dtype=np.int64)])[data.document_indices]
    lengths = np.diff(ends)
    first = data.tokens[:num_first]
    found = {
        "documents": f"{lengths.size:,}",
        "sequences": f"{len(data):,}",
        "tokens": f"{data.num_tokens:,}",
        "dtype": data.dtype.name,
        "lengths": "none" if not lengths.size else f"min {lengths.min():,}, median {np.median(lengths):,.1f}, max {lengths.max():,}",
        "empty documents": f"{int((lengths == 0).sum()):,}",
        "sha256 .bin": _sha256(str(data.bin_path)),
        "sha256 .idx": _sha256(str(data.idx_path)),
        "first tokens": " ".join(map(str, first.tolist())),
    }
    if tokenizer is not None:
        highest = int(first.max()) if first.size else 0
        if highest >= tokenizer.vocab_size:
            message = f"{data.bin_path}: token id {highest} is outside the tokenizer's vocabulary of {tokenizer.vocab_size}"
            raise DataError(message, remedy="give the tokenizer that made the data")
        found["first text"] = repr(tokenizer.decode(first.tolist()))
    return found


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
