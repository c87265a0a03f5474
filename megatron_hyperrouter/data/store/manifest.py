"""``PREFIX.manifest.json``: the content of a pair of token files, its sources, and its checksums.

The same text and settings give the same manifest, byte for byte, on any number of machines.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from megatron_hyperrouter.data.store.pair_writer import DiskRefused, FileSum
from megatron_hyperrouter.data.text.inputs import InputRange
from megatron_hyperrouter.data.text.streams import replacing
from megatron_hyperrouter.errors import DataError

ENDING = ".manifest.json"
_VERSION = 1
_BLOCK = 1 << 20
_AGAIN = "copy the files again, or rebuild them with mhr preprocess"


@dataclass(frozen=True)
class Manifest:
    """The description of a pair of token files; written and read as JSON."""

    documents: int
    sequences: int
    tokens: int
    dtype: str
    bin: FileSum
    idx: FileSum
    tokenizer: dict[str, Any]  # type, SHA-256 of its file, vocabulary size
    settings: dict[str, Any]  # key, append_eod
    inputs: list[dict[str, Any]]  # path and bytes of each
    part: str  # "1/1", or which of how many shards
    words: int = 0  # of the text, between ASCII white space; 0 in manifests of older versions
    left_out: int = 0  # lines that could not be used

    def whole(self) -> bool:
        """Whether this is not a shard."""
        return self.part == str(InputRange())


def write_manifest(prefix: str, manifest: Manifest) -> None:
    """Write it next to the pair, atomically; raises DiskRefused."""
    # JSON can write characters of a path that is not UTF-8 only with this escape
    escaped = "backslashreplace"
    try:
        with replacing(prefix + ENDING) as stream:
            stream.write(
                json.dumps({"version": _VERSION, **asdict(manifest)}, indent=1, ensure_ascii=False).encode(
                    errors=escaped
                )
                + b"\n"
            )
    except DataError as error:
        raise DiskRefused(error.message, remedy=error.remedy) from error


def read_manifest(prefix: str) -> Manifest:
    """The manifest of a pair; DataError if there is none, or none that can be understood."""
    path = Path(prefix + ENDING)
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        remedy = "leave out --verify; only mhr preprocess writes a manifest"
        raise DataError(f"{path}: no such manifest", remedy=remedy) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}", remedy=_AGAIN) from error
    try:
        if found["version"] != _VERSION:
            raise DataError(
                (
                    f"{path}: the manifest has version {str(found['version'])[:60]}, but this program "
                    f"reads version {_VERSION}"
                ),
                remedy="use the version of this program that wrote it",
            )
        sums = {ending: FileSum(**_typed(FileSum, found[ending])) for ending in ("bin", "idx")}
        return Manifest(**_typed(Manifest, {**found, **sums}))
    except (KeyError, TypeError) as error:
        why = f'the field "{error.args[0]}" is missing' if isinstance(error, KeyError) else error
        raise DataError(f"{path}: not a manifest of token files ({why})", remedy=_AGAIN) from error


def manifest_of(prefix: str) -> Manifest | None:
    """The manifest of a pair, or None if it has none, like pairs that other programs wrote."""
    return read_manifest(prefix) if os.path.exists(prefix + ENDING) else None


def check_tokenizer(prefix: str, tokenizer: Mapping[str, Any]) -> None:
    """DataError if the manifest of a pair names another tokenizer than the one with this identity."""
    manifest = manifest_of(prefix)
    if manifest is None or same_tokenizer(manifest.tokenizer, tokenizer):
        return
    theirs, ours = described(manifest.tokenizer), described(tokenizer)
    raise DataError(
        f"{prefix}: the data were made with the tokenizer {theirs}, but this run uses {ours}",
        remedy=(
            "use the tokenizer that made the data (--tokenizer-type, --tokenizer-model), "
            "or preprocess the text with this tokenizer"
        ),
    )


def described(tokenizer: Mapping[str, Any]) -> str:
    """A tokenizer's identity in words for a message: type, digest of its file, size of its vocabulary."""
    digest = tokenizer.get("sha256")
    file = f" with SHA-256 {str(digest)[:16]}..." if digest else ""
    return f"{str(tokenizer.get('type'))[:40]}{file} and {str(tokenizer.get('vocab_size'))[:20]} ids"


def _typed(kind: type[Manifest | FileSum], found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``kind``; KeyError for one that is not there, TypeError for one of another type."""
    values = {}
    for each in fields(kind):
        value = found[each.name] if each.default is MISSING else found.get(each.name, each.default)
        wanted = get_type_hints(kind)[each.name]
        if not isinstance(value, get_origin(wanted) or wanted) or isinstance(value, bool):
            raise TypeError(f'the field "{each.name}" must not be {str(value)[:60]}')
        values[each.name] = value
    return values


def same_tokenizer(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether two identities (see ``Tokenizer.identity``) belong to one tokenizer.

    NullTokenizer reads the ids of every tokenizer whose vocabulary is not larger than its own.
    """
    if ours["type"] == "NullTokenizer":
        size = theirs.get("vocab_size")
        return isinstance(size, int) and size <= ours["vocab_size"]
    if theirs.get("vocab_size") != ours["vocab_size"]:
        return False
    if ours["sha256"] is None:
        return bool(theirs.get("type") == ours["type"])
    return bool(theirs.get("sha256") == ours["sha256"])


def compare(prefix: str, manifest: Manifest, found: Mapping[str, object], sums: dict[str, FileSum]) -> None:
    """DataError for the first difference between a pair and its manifest: counts ``found`` by name, sizes and
    checksums.
    """
    name = prefix + ENDING
    for ending, real in sums.items():
        told: FileSum = getattr(manifest, ending)
        if real.bytes != told.bytes:
            message = (
                f"{prefix}.{ending}, byte {min(real.bytes, told.bytes)}: the file has "
                f"{real.bytes} bytes, but {name} says {told.bytes}"
            )
            raise DataError(message, remedy=_AGAIN)
        if real.sha256 != told.sha256:
            message = (
                f"{prefix}.{ending}: the file has changed: its SHA-256 is {real.sha256[:16]}..., "
                f"but {name} says {told.sha256[:16]}..."
            )
            raise DataError(message, remedy=_AGAIN)
    for what, value in found.items():
        if value != getattr(manifest, what):
            raise DataError(
                f"{name} says {getattr(manifest, what)} {what}, but the files have {value}", remedy=_AGAIN
            )


def file_sum(path: str, told: Callable[[int], None] | None = None) -> FileSum:
    """Size and checksum of a file; DataError if it cannot be read.  ``told(bytes)`` is called with the
    number of bytes of each read.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                size += len(block)
                if told:
                    told(len(block))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}", remedy=_AGAIN) from error
    return FileSum(size, digest.hexdigest())
