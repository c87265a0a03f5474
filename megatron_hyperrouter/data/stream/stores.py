"""Opens the token files of a run, and refuses those that it cannot read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_hyperrouter.data.order.index_files import file_identity
from megatron_hyperrouter.data.store.made_up import PREFIX, MadeUpTokens
from megatron_hyperrouter.data.store.manifest import check_tokenizer
from megatron_hyperrouter.data.store.token_files import IndexedDataset
from megatron_hyperrouter.errors import DataError

MOCK = PREFIX  # the prefix of made-up tokens


def open_store(
    prefix: str, tokenizer: Mapping[str, Any] | None, *, vocab_size: int, eod: int | None
) -> IndexedDataset:
    """The pair with that prefix; only the header of its index is checked so far.

    ``tokenizer``: the identity of the run's tokenizer, which must match that of the data; None: any.
    DataError for files that are missing, empty, or made with another tokenizer.  ``vocab_size``, ``eod``:
    for made-up tokens.
    """
    if prefix == PREFIX:
        return MadeUpTokens(vocab_size, eod)
    store = IndexedDataset(prefix, whole=False)
    if tokenizer is not None:
        check_tokenizer(prefix, tokenizer)
    if not len(store):
        raise DataError(f"{prefix}.idx: the corpus has no documents", remedy="preprocess a file with text")
    return store


def cache_key(store: IndexedDataset) -> Mapping[str, Any]:
    """What the indices of a store depend on, besides the settings."""
    return store.cache_key() if isinstance(store, MadeUpTokens) else file_identity(store.idx_path)
