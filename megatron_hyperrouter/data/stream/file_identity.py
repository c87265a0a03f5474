"""Whether the files that a run reads are those of its ledger.

A file is identified by its numbers of documents and tokens, by a digest of some of its bytes, and by the
checksums in its manifest; not by its name or its times.  If data were copied, moved or touched, the run
continues after the part already read. Data that were changed in place are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_hyperrouter import console
from megatron_hyperrouter.config.leaves import flag, shown
from megatron_hyperrouter.data.order.index_files import IndexCache, file_identity
from megatron_hyperrouter.data.store.manifest import file_sum, manifest_of
from megatron_hyperrouter.data.store.token_files import IndexedDataset
from megatron_hyperrouter.errors import DataError

Identity = dict[str, Any]
Ledger = list[dict[str, Any]]

_BLOCKS, _BLOCK = 64, 4096  # of each file, evenly spread from its first bytes to its last
_COMPARED = ("documents", "tokens", "sampled", "sha256")


def identity(store: IndexedDataset) -> Identity:
    """The identity of a file; takes a few reads, for a file of any size.

    ``sampled``: a digest of blocks of both files.  ``sha256``: the manifest's checksums of ``.bin`` and
    ``.idx``; None without a manifest.  ``changed``: modification times of both.
    """
    digest = hashlib.blake2b(digest_size=16)
    for block in store.blocks(_BLOCKS, _BLOCK):
        digest.update(block)
    manifest = manifest_of(store.prefix)
    return {
        "documents": len(store),
        "tokens": len(store.tokens),
        "sampled": digest.hexdigest(),
        "sha256": None if manifest is None else [manifest.bin.sha256, manifest.idx.sha256],
        "changed": store.changed(),
    }


def same(was: Identity, now: Identity) -> bool:
    """Whether two identities are of the same text, by the facts that both have."""
    return all(was[name] == now[name] for name in _COMPARED if was.get(name) and now.get(name))


def check_unchanged(store: IndexedDataset, was: Identity, now: Identity, cache: IndexCache) -> None:
    """DataError if a file was written since the checkpoint and no longer agrees with its manifest.

    Modification times show whether it was written.  A copy may change them, too, so all bytes are then
    compared, once on each node.
    """
    if was.get("changed") in (None, now["changed"]) or not now["sha256"]:
        return
    for path, expected in zip((store.bin_path, store.idx_path), now["sha256"], strict=True):
        found = _sum_of(path, cache)
        if found != expected:
            raise DataError(
                (
                    f"{path}: the file has changed since the run read it: its SHA-256 is "
                    f"{found[:16]}..., but its manifest says {expected[:16]}..."
                ),
                remedy="restore the file that the run has read, or start a new run from its weights with "
                "--finetune",
            )


def _sum_of(path: Path, cache: IndexCache) -> str:
    """The SHA-256 of a file, cached with the index files for the other processes and the next run."""

    def build() -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
        console.note(
            f"comparing all of {path} with its manifest, because the file is newer than the checkpoint"
        )
        yield "sha256", np.frombuffer(bytes.fromhex(file_sum(str(path)).sha256), np.uint8)

    key = {"kind": "SHA-256", "file": file_identity(path)}
    found = cache.arrays(key, ("sha256",), build, beside=str(path), numbers=cache.cached_from)
    return found["sha256"].tobytes().hex()


def same_text(found: Identity, files: Mapping[str, Identity | None]) -> str | None:
    """The first of the files with the same text."""
    return next((path for path, known in files.items() if known and same(known, found)), None)


def repeated(files: Mapping[str, Identity]) -> list[tuple[str, str]]:
    """Each file that contains the same text as an earlier one, with that one."""
    found = []
    # only files of equal size are compared, so that many files take little time
    alike: dict[tuple[int, int], dict[str, Identity]] = {}
    for name, known in files.items():
        earlier_ones = alike.setdefault((known["documents"], known["tokens"]), {})
        earlier = same_text(known, earlier_ones)
        if earlier is not None:
            found.append((name, earlier))
        earlier_ones[name] = known
    return found


def under_present_names(ledger: Ledger, files: Mapping[str, Identity]) -> Ledger:
    """The ledger of a run that continues with ``files`` (prefix -> identity).

    If the ledger has a file under a prefix that the run no longer reads, the file gets its present prefix.
    DataError if a file has a prefix of the ledger but other content.
    """
    recorded = {entry["path"]: entry.get("file") for segment in ledger for entry in segment["sets"]}
    changed = [
        f"{path}: {_difference(was, files[path])}"
        for path, was in recorded.items()
        if was and path in files and not same(was, files[path])
    ]
    if changed:
        raise DataError(
            "\n  - ".join(
                [
                    (
                        "the run has read a different file under this name:"
                        if len(changed) == 1
                        else "the run has read different files under these names:"
                    ),
                    *changed,
                ]
            ),
            remedy=(
                "restore the files that the run has read, and store new text under another prefix; "
                "or start a new run from its weights with --finetune"
            ),
        )
    gone = {path: was for path, was in recorded.items() if was and path not in files}
    renamed = {
        path: new
        for path, was in gone.items()
        for new in files
        if new not in recorded and same(was, files[new])
    }
    if len(set(renamed.values())) < len(renamed):  # two equal files cannot be distinguished
        renamed = {}
    for old, new in renamed.items():
        console.note(
            f"{new} has the same content as {old} in the checkpoint; continuing after the part already read"
        )
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
    before, after = ("{documents} documents with {tokens} tokens".format_map(each) for each in (was, now))
    if before != after:
        return f"it had {before} and now has {after}"
    return f"it still has {before}, but its content has changed"


def changed_settings(now: Mapping[str, Any], last: Mapping[str, Any]) -> list[str]:
    """Settings in ``now`` that differ from those of a segment of the ledger, as flags write them."""
    before = {name: last.get(name, False) for name in now}
    return [
        f"{'--data-path' if name == 'mix' else flag(name)} was {_shown(name, before[name])} "
        f"and is now {_shown(name, value)}"
        for name, value in now.items()
        if before[name] != value
    ]


def _shown(name: str, value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value))
    return shown(None if name == "rampup_batch_size" and not value else value)
