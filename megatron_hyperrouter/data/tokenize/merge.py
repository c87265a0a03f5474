"""Joins the shards of several machines: byte for byte what one run over all inputs writes."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_hyperrouter.data.store.journal import locked_output
from megatron_hyperrouter.data.store.manifest import (
    ENDING,
    Manifest,
    file_sum,
    read_manifest,
    write_manifest,
)
from megatron_hyperrouter.data.store.pair_writer import PairWriter, put_in_place, remove_partial
from megatron_hyperrouter.data.store.token_files import IndexedDataset
from megatron_hyperrouter.data.text.inputs import InputRange
from megatron_hyperrouter.data.tokenize.preprocess import Written, check_not_empty
from megatron_hyperrouter.errors import DataError

_CHUNK = 1 << 20  # sequences, or bytes of tokens, copied at a time
_SHARED = ("dtype", "tokenizer", "settings", "inputs")


def merge(
    output_prefix: str, *, remove_shards: bool = False, progress: Callable[[int, int], None] | None = None
) -> list[Written]:
    """Join the shards ``{output_prefix}.shard-I-of-N_{key}_document`` of each key into
    ``{output_prefix}_{key}_document``.

    Checksums are compared with the manifests while reading.  ``remove_shards``: remove them once all pairs
    are complete. ``progress(bytes, all bytes)``. DataError for a shard that is missing, damaged, or made
    with other settings.
    """
    found = find_shards(output_prefix)
    with locked_output(output_prefix):
        written = _join(output_prefix, found, progress)
    for shards in found.values() if remove_shards else ():
        for shard, _ in shards:
            for ending in (ENDING, ".idx", ".bin"):
                _remove(shard + ending)
    return written


def _remove(path: str) -> None:
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        message = f"the shards are merged, but {path} cannot be removed: {error.strerror or error}"
        raise DataError(message, remedy="remove the shards yourself; nothing else is left to do") from error


def _join(
    output_prefix: str,
    found: dict[str, list[tuple[str, Manifest]]],
    progress: Callable[[int, int], None] | None,
) -> list[Written]:
    """Write the pair of each key."""
    total = sum(manifest.bin.bytes for shards in found.values() for _, manifest in shards)
    done = 0
    writers: list[PairWriter] = []
    try:
        for key, shards in found.items():
            writer = PairWriter(f"{output_prefix}_{key}_document", np.dtype(shards[0][1].dtype))
            writers.append(writer)
            for shard, manifest in shards:
                _append(writer, shard, manifest)
                done += manifest.bin.bytes
                if progress:
                    progress(done, total)
            check_not_empty(writer.counts, key, [each["path"] for each in manifest.inputs])
        return [
            _finish(writer, [manifest for _, manifest in shards])
            for writer, shards in zip(writers, found.values(), strict=True)
        ]
    finally:
        for writer in writers:
            writer.close()
            remove_partial(writer.prefix)


def _finish(writer: PairWriter, shards: Sequence[Manifest]) -> Written:
    """Give a pair that is all written its names and its manifest, which is that of a shard except for what
    was counted.
    """
    counts = writer.save()
    idx = put_in_place(writer.prefix, writer.dtype, counts)
    counted = replace(
        shards[0],
        documents=counts.documents,
        sequences=counts.sequences,
        tokens=counts.tokens,
        words=sum(shard.words for shard in shards),
        left_out=sum(shard.left_out for shard in shards),
    )
    write_manifest(writer.prefix, replace(counted, part=str(InputRange()), bin=writer.bin_sum(), idx=idx))
    return Written(writer.prefix, counts.documents, counts.sequences, counts.tokens, writer.dtype)


def find_shards(output_prefix: str) -> dict[str, list[tuple[str, Manifest]]]:
    """For each key, prefixes and manifests of its shards in order; DataError unless all exist and agree."""
    pattern = re.compile(
        re.escape(output_prefix) + r"\.shard-(\d+)-of-(\d+)_(.+)_document" + re.escape(ENDING)
    )
    found: dict[str, dict[tuple[int, int], str]] = {}
    for path in sorted(glob.glob(f"{glob.escape(output_prefix)}.shard-*{ENDING}")):
        match = pattern.fullmatch(path)
        if match:
            found.setdefault(match[3], {})[int(match[1]), int(match[2])] = path.removesuffix(ENDING)
    if not found:
        remedy = "create them with mhr preprocess --shard I/N and the same --output-prefix"
        raise DataError(
            f"{output_prefix}: there are no shards ({output_prefix}.shard-I-of-N_KEY_document{ENDING})",
            remedy=remedy,
        )
    return {key: _checked(output_prefix, key, shards) for key, shards in found.items()}


def _checked(output_prefix: str, key: str, shards: dict[tuple[int, int], str]) -> list[tuple[str, Manifest]]:
    numbers = sorted({of for _, of in shards})
    if len(numbers) > 1:
        cuts = " and ".join(map(str, numbers))
        raise DataError(
            (
                f"{output_prefix}: the shards of the key {key!r} do not belong together: they were "
                f"made with --shard I/N for N = {cuts}"
            ),
            remedy="keep the shards with the right N, and delete all others",
        )
    of = numbers[0]
    missing = [str(InputRange(number, of)) for number in range(1, of + 1) if (number, of) not in shards]
    if missing:
        remedy = "create the missing shards with mhr preprocess --shard I/N, and copy their manifests too"
        raise DataError(
            f"{output_prefix}: shard {', '.join(missing)} of the key {key!r} is missing", remedy=remedy
        )
    read = [(prefix, read_manifest(prefix)) for _, prefix in sorted(shards.items())]
    first_prefix, first = read[0]
    for prefix, manifest in read:
        for what in _SHARED:
            if getattr(manifest, what) != getattr(first, what):
                message = (
                    f"{prefix}{ENDING}: {what} is {getattr(manifest, what)}, but "
                    f"{getattr(first, what)} in {first_prefix}{ENDING}"
                )
                raise DataError(
                    message, remedy="create all shards from the same files, with the same names and settings"
                )
    return read


def _append(writer: PairWriter, prefix: str, manifest: Manifest) -> None:
    """Copy one shard; DataError if it does not agree with its manifest."""
    data = IndexedDataset(prefix)
    digest = hashlib.sha256()
    begin = 0
    marks = data.document_indices
    for first in range(0, len(marks) - 1, _CHUNK):
        some = marks[first : first + _CHUNK + 1]
        lengths = data.sizes[some[0] : some[-1]]
        end = begin + int(lengths.sum(dtype=np.int64))
        tokens = np.ascontiguousarray(data.tokens[begin:end])
        digest.update(tokens.data)
        writer.write(tokens, lengths, np.diff(some).astype(np.int32))
        begin = end
    for ending, same in (
        ("bin", digest.hexdigest() == manifest.bin.sha256),
        ("idx", file_sum(f"{prefix}.idx") == manifest.idx),
    ):
        if not same:
            raise DataError(
                f"{prefix}.{ending}: the file does not match {prefix}{ENDING}",
                remedy="copy the shard again, or create it again",
            )
