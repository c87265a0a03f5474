"""Compares a folder with its certificate; needs only the standard library, so any machine can check a
copy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hyperrouter.checkpoint.tensor_files import digest_of_bytes, read_header
from megatron_hyperrouter.errors import CheckpointError, reason_of

CERTIFICATE = "certificate.json"
FORMAT = 1


def read_certificate(folder: Path) -> dict[str, Any]:
    """The certificate; CheckpointError if there is none, or none that this version reads."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}", remedy="use a folder that mhr export-hf wrote")
    path = folder / CERTIFICATE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known, _, _ = found["format"], dict(found["files"]), dict(found["tensors"])
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no {CERTIFICATE}, so it is not a finished export",
            remedy="use a folder that mhr export-hf wrote",
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {reason_of(error)}", remedy="restore the file from a copy"
        ) from error
    if known != FORMAT:
        raise CheckpointError(
            f"{path} has format {known}; this program reads format {FORMAT}",
            remedy=f"use the version of this program that wrote {path}",
        )
    return dict(found)


def differences(folder: Path, certificate: dict[str, Any]) -> list[str]:
    """How the folder differs from its certificate: files and tensors that are missing, altered or extra.

    Hidden files are ignored.  A download from the Hugging Face hub adds some, such as ``.gitattributes``, and
    no program loads them.
    """
    found: list[str] = []
    seen: set[str] = set()
    for name, wanted in certificate["files"].items():
        found += _differences_of_file(folder / name, wanted, certificate["tensors"], seen)
    found += [f"{tensor}: missing" for tensor in sorted(set(certificate["tensors"]) - seen)]
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    extra = there - set(certificate["files"]) - {CERTIFICATE}
    return found + [f"{name}: the certificate does not list this file" for name in sorted(extra)]


def _differences_of_file(
    path: Path, wanted: dict[str, Any], tensors: dict[str, str], seen: set[str]
) -> Iterator[str]:
    if not path.is_file():
        yield f"{path.name}: missing"
        return
    if (size := path.stat().st_size) != wanted["bytes"]:
        yield f"{path.name}: the file has {size} bytes instead of {wanted['bytes']}"
    altered = digest_of_bytes(path) != wanted["sha256"]
    told = False
    if path.suffix == ".safetensors":
        try:
            entries = read_header(path)
        except (OSError, ValueError) as error:
            yield f"{path.name}: {reason_of(error)}"
            return
        for entry in entries:
            seen.add(entry.name)
            if entry.name not in tensors:
                yield f"{path.name}: the certificate does not list the tensor {entry.name}"
            elif altered and digest_of_bytes(path, entry.begin, entry.end) != tensors[entry.name]:
                told = True
                yield f"{path.name}: {entry.name} ({entry.dtype} {list(entry.shape)}) has changed"
    if altered and not told and size == wanted["bytes"]:
        yield f"{path.name}: the file has changed"
