"""Opens the token files of a run, and refuses those that it cannot read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_hyperrouter.data.store.manifest import check_tokenizer
from megatron_hyperrouter.data.store.token_files import IndexedDataset
from megatron_hyperrouter.errors import DataError


def open_store(prefix: str, tokenizer: Mapping[str, Any] | None) -> IndexedDataset:
    """The pair of that prefix, of whose index only the header is checked yet.

    ``tokenizer``: the identity of the run's, which must be that of the data; None: any.  DataError for files
    that are missing, empty, or made with another tokenizer.
    """
    store = IndexedDataset(prefix, whole=False)
    if tokenizer is not None:
        check_tokenizer(prefix, tokenizer)
    if not len(store):
        raise DataError(
            f"{prefix}.idx: the corpus is empty: 0 documents", remedy="preprocess a file that holds text"
        )
    return store
