"""``manifest.json``, which seals a checkpoint: its step, its files, and a checksum of itself.

Only files that the manifest lists are part of the checkpoint. A weights or state file that is not listed
was left by a copy or by another program, and is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_hyperrouter.errors import CheckpointError

FORMAT = 2
MANIFEST = "manifest.json"
PART = ".part-"  # sizes and checksums of one rank's files, until the manifest joins them
CLASSIFIER = "classifier"  # an entry of "meta": the model has a classification head
# what a reader may open
_READ = (
    "weights-*",
    "state-*",
    "optimizer*",
    "random*",
    "settings.yaml",
    "tokenizer/*",
)
_STEP_NAME = re.compile(r"step_(\d{7,})")
_CHUNK = 1 << 22


def folder_name(step: int) -> str:
    """``step_0000100`` for step 100."""
    return f"step_{step:07d}"


def part_name(rank: int) -> str:
    """The file in which a rank says that its files are on disk."""
    return f"{PART}{rank}"


def step_of(folder: Path) -> int | None:
    """100 for a folder called ``step_0000100``; None for another name."""
    match = _STEP_NAME.fullmatch(folder.name)
    return int(match[1]) if match and folder_name(int(match[1])) == folder.name else None


def sealed_steps(root: Path) -> list[int]:
    """Steps of the sealed checkpoints in a folder, oldest first."""
    steps = ((step_of(path.parent), path) for path in root.glob(f"step_*/{MANIFEST}"))
    return sorted(step for step, _ in steps if step is not None)


def manifest_text(step: int, meta: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> str:
    """What seals a checkpoint of these files (name -> :func:`fingerprint`)."""
    content = {"format": FORMAT, "step": step, "meta": dict(meta), "files": dict(sorted(files.items()))}
    return json.dumps({**content, "sha256": _digest(content)}, indent=1)


def read_manifest(folder: Path) -> dict[str, Any]:
    """``format``, ``step``, ``meta``, ``files`` and ``sha256`` of a checkpoint; CheckpointError if they do
    not agree.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {_short(error)}", remedy=older(folder)) from error
    if wrong := _wrong(manifest):
        raise CheckpointError(f"{path} cannot be used: {wrong}", remedy=older(folder))
    if manifest["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest['format']}; this program reads formats up to {FORMAT}",
            remedy="use the version of this program that wrote it",
        )
    named = step_of(folder)
    if named is not None and named != manifest["step"]:
        raise CheckpointError(
            f"{path} is for step {manifest['step']}, but its folder is named after another step",
            remedy=older(folder),
        )
    if manifest["format"] >= 2 and manifest.get("sha256") != _digest(manifest):
        raise CheckpointError(
            f"{path} has changed: its own checksum does not match its content", remedy=older(folder)
        )
    return dict(manifest)


def read_meta(folder: Path) -> dict[str, Any]:
    """The mapping that was given to ``CheckpointFolders.save``."""
    return dict(read_manifest(folder)["meta"])


def refuse_unlisted(folder: Path, files: Mapping[str, Any]) -> None:
    """CheckpointError for a file that looks like a part of the checkpoint, but is not listed.

    No reader opens hidden files, such as those that file managers and NFS leave.
    """
    found = (
        path
        for pattern in _READ
        for path in folder.glob(pattern)
        if not path.is_dir() and not path.name.startswith(".")
    )
    if unlisted := sorted({path.relative_to(folder).as_posix() for path in found} - set(files)):
        raise CheckpointError(
            f"{folder / unlisted[0]} is not a file of this checkpoint: {MANIFEST} does not list it",
            remedy="move it out of that folder, or copy the checkpoint again",
        )


def damage(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str:
    """What is wrong with the first file that does not match the manifest; empty if all match."""
    for name in sorted(files):
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if (found := path.stat().st_size) != files[name]["bytes"]:
            return f"{path} has {found} bytes instead of {files[name]['bytes']}"
        if fingerprint(path) != {key: files[name][key] for key in ("bytes", "crc32")}:
            return f"{path} has changed: its checksum does not match {MANIFEST}"
    return ""


def files_of(folder: Path) -> list[Path]:
    """Every file in an unfinished checkpoint, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(PART))


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and CRC-32. They detect truncation and corruption, not forgery, and take half the time of
    SHA-256.
    """
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return {"bytes": size, "crc32": f"{checksum:08x}"}


def older(folder: Path) -> str:
    """What to do about a damaged checkpoint."""
    step = step_of(folder)
    earlier = [other for other in sealed_steps(folder.parent) if step is not None and other < step]
    if earlier:
        return f"continue from the previous checkpoint with --load {folder.parent / folder_name(earlier[-1])}"
    return (
        f"there is no older checkpoint in {folder.parent}; restore the folder from a copy, "
        "or train again without --load"
    )


def _digest(manifest: Mapping[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _wrong(manifest: Any) -> str:
    """What is wrong with a manifest; empty if every part of it has the right type."""
    if not isinstance(manifest, dict):
        return "it is not a JSON object"
    kinds = {"format": int, "step": int, "meta": dict, "files": dict}
    for name, kind in kinds.items():
        if not isinstance(manifest.get(name), kind) or isinstance(manifest.get(name), bool):
            return f'the field "{name}" is missing or has the wrong type'
    if manifest["format"] < 1 or manifest["step"] < 0:
        return "format or step is out of range"
    if not manifest["files"]:
        return "the list of files is empty"
    for name, entry in manifest["files"].items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or "\0" in name:
            return f"the list of files has {name}, a path outside the folder"
        if not isinstance(entry, dict) or not {"bytes", "crc32"} <= entry.keys():
            return f"the entry of {name} lacks a size or a checksum"
    return ""


def _short(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_language_model(folder: Path, manifest: Mapping[str, Any]) -> None:
    """CheckpointError if this is the checkpoint of a classifier."""
    if CLASSIFIER in manifest["meta"]:
        raise CheckpointError(
            f"{folder} is a fine-tuned classifier, which predicts classes and not tokens",
            remedy="use the language model from which it was fine-tuned, or test the classifier with "
            "mhr finetune --test",
        )
