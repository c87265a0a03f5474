"""Whether the files that a run reads are those of its ledger.

A file is known by how many documents and tokens it holds and by a digest of some of its bytes, not by its
name or its times: data that was copied, moved or touched goes on where it was.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hyperrouter import console
from megatron_hyperrouter.data.store.token_files import IndexedDataset
from megatron_hyperrouter.errors import DataError

Identity = dict[str, Any]
Ledger = list[dict[str, Any]]

_BLOCKS, _BLOCK = 8, 4096  # of each file, evenly spread from its first bytes to its last


def identity(store: IndexedDataset) -> Identity:
    """What a file is known by; a few reads, however large it is."""
    digest = hashlib.blake2b(digest_size=16)
    for path in (store.idx_path, store.bin_path):
        for block in _some_blocks(path):
            digest.update(block)
    return {"documents": len(store), "tokens": len(store.tokens), "digest": digest.hexdigest()}


def under_present_names(ledger: Ledger, files: Mapping[str, Identity]) -> Ledger:
    """The ledger of a run that goes on with ``files`` (prefix -> identity).

    A file that it knows by another prefix, which the run no longer reads, gets its present one.  DataError
    where a file has the prefix of one in the ledger and is another.
    """
    recorded = {entry["path"]: entry.get("file") for segment in ledger for entry in segment["sets"]}
    changed = [
        f"{path}: {_difference(was, files[path])}"
        for path, was in recorded.items()
        if was and path in files and was != files[path]
    ]
    if changed:
        raise DataError(
            "\n  - ".join(
                [
                    f"the checkpoint has read {'another file' if len(changed) == 1 else 'other files'} of "
                    "the same name:",
                    *changed,
                ]
            ),
            remedy="put back what that run has read and name other text by another prefix, or start a new "
            "epoch with --finetune",
        )
    gone = {path: was for path, was in recorded.items() if was and path not in files}
    renamed = {
        path: new for path, was in gone.items() for new in files if new not in recorded and files[new] == was
    }
    if len(set(renamed.values())) < len(renamed):  # two equal files, of which nobody can tell which is which
        renamed = {}
    for old, new in renamed.items():
        console.note(f"{new} is what the checkpoint knows as {old}: it is read on where it was")
    return [
        {
            **segment,
            "mix": [renamed.get(word.strip(), word) for word in segment["mix"]],
            "sets": [
                {**entry, "path": renamed.get(entry["path"], entry["path"])} for entry in segment["sets"]
            ],
        }
        for segment in ledger
    ]


def _difference(was: Identity, now: Identity) -> str:
    counts = ("{documents} documents with {tokens} tokens".format_map(each) for each in (was, now))
    before, after = counts
    if before == after:
        return (
            f"it had {before}, and has as many, but their digest was {was['digest']} and is {now['digest']}"
        )
    return f"it had {before}, and has {after}"


def _some_blocks(path: Path) -> list[bytes]:
    try:
        with open(path, "rb", buffering=0) as stream:
            last = max(os.fstat(stream.fileno()).st_size - _BLOCK, 0)
            return [
                os.pread(stream.fileno(), _BLOCK, last * number // (_BLOCKS - 1)) for number in range(_BLOCKS)
            ]
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}", remedy="check its permissions and its disk"
        ) from error
