"""Whether documents end with the end-of-document token that some settings need: a quick look at a few
documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from megatron_hyperrouter.config.leaves import flag
from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.store.token_files import IndexedDataset

MINDING = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss", "pack_documents")
_LOOKED_AT, _AMONG = 8, 256  # non-empty documents to examine, and documents to search for them
_NAMED = 3  # files


def warning_about_ends(data: DataConfig, stores: Iterable[IndexedDataset], eod: int | None) -> str | None:
    """A warning if none of the examined documents ends with ``eod`` and settings depend on it; ``eod``
    None: no setting does.
    """
    flags = [flag(name) for name in MINDING if getattr(data, name)]
    found = [] if eod is None or not flags else [store.prefix for store in stores if not _ends(store, eod)]
    if not found:
        return None
    left = len(found) - _NAMED
    more = f" and {left} more file{'s' if left > 1 else ''}" if left > 0 else ""
    return (
        f"{', '.join(found[:_NAMED])}{more}: none of the first documents ends with id {eod}, but "
        f"{', '.join(flags)} {'need' if len(flags) > 1 else 'needs'} this id to separate documents; "
        "preprocess the text with --append-eod and the tokenizer of this run"
    )


def _ends(store: IndexedDataset, eod: int) -> bool:
    """Whether one of the examined documents ends with ``eod``; True if none contains a token."""
    # sequences with which documents end
    last = (int(mark) - 1 for mark in store.document_indices[1 : 1 + _AMONG])
    some = list(islice((i for i in last if i >= 0 and store.sizes[i] > 0), _LOOKED_AT))
    return not some or any(int(store.get(i, int(store.sizes[i]) - 1)[0]) == eod for i in some)
