"""What a checkpoint says about the run that wrote it: its settings, its tokenizer, and where it ran.

With this, a checkpoint needs no other file.  ``settings.yaml`` has all settings.  The folder ``tokenizer``
has the files of the tokenizer; if they are large, only their digest.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hyperrouter.checkpoint.manifest import damage, older
from megatron_hyperrouter.config.by_role import leaves_with
from megatron_hyperrouter.config.cli import dump
from megatron_hyperrouter.config.leaves import value_of
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import CheckpointError, DataError

SETTINGS = "settings.yaml"
TOKENIZER = "tokenizer"
LARGEST_TOKENIZER = 32 << 20  # bytes; a larger one is known by its digest alone
_TOGETHER = (  # files that belong to one tokenizer; any of them may be named
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Description:
    """``texts``: files by their path in the checkpoint; ``meta``: entries of the manifest."""

    texts: dict[str, bytes] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


def describe(
    config: RunConfig, *, tokenizer: Mapping[str, Any] | None = None, fetched: Sequence[Path] = ()
) -> Description:
    """The description of a run, made when it starts. Later changes on disk do not affect it.

    ``tokenizer``: its identity.  ``fetched``: its files, where ``--tokenizer-model`` names a model on a hub.
    """
    texts = {SETTINGS: dump(config).encode()}
    files, kept = _tokenizer_files(config, fetched)
    known: dict[str, Any] = {"type": config.data.tokenizer_type, **(tokenizer or {})}
    if sum(map(len, files.values())) <= LARGEST_TOKENIZER:
        texts.update({f"{TOKENIZER}/{name}": content for name, content in files.items()})
        known["kept"] = kept
    origin = {
        "folder": str(Path.cwd()),
        "run_dir": os.path.abspath(config.logging.run_dir),
        "host": socket.gethostname(),
    }
    return Description(texts, {"tokenizer": known, "origin": origin})


def places(path: str, origin: Mapping[str, str], run_dir: Path) -> Iterator[str]:
    """Where a path in the settings of a run may be now, the most likely place first.

    The path is tried relative to the folder in which the run was started, to the current folder, and to
    the run's present folder.  ``origin``: see :func:`describe`; ``run_dir``: where the run is
    now.
    """
    then = os.path.join(origin.get("folder", ""), path)
    yield then
    yield path
    if "run_dir" in origin:
        yield os.path.normpath(os.path.join(run_dir, os.path.relpath(then, origin["run_dir"])))


def settings_file(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> Path | None:
    """The settings in a checkpoint, which are needed before all its files are verified.

    ``files``: those that its manifest lists.  None in a checkpoint of an older version, which has no
    settings; CheckpointError if the file is damaged.
    """
    if SETTINGS not in files:
        return None
    if wrong := damage(folder, {SETTINGS: files[SETTINGS]}):
        raise CheckpointError(wrong, remedy=older(folder))
    return folder / SETTINGS


def tokenizer_paths(config: RunConfig) -> dict[str, str]:
    """The settings that name a file or folder of the tokenizer, by name."""
    found = {leaf.name: value_of(config, leaf.name) for leaf in leaves_with(Role.TOKENIZER) if leaf.is_path}
    return {name: value for name, value in found.items() if value is not None}


def _tokenizer_files(config: RunConfig, fetched: Sequence[Path]) -> tuple[dict[str, bytes], dict[str, str]]:
    """The tokenizer's files by name, and for each setting that names one the path in the checkpoint."""
    files: dict[str, bytes] = {}
    kept: dict[str, str] = {}
    for setting, value in tokenizer_paths(config).items():
        path = Path(value)
        if path.is_file():
            kept[setting] = f"{TOKENIZER}/{path.name}"
            found: Sequence[Path] = _with_siblings(path)
        else:
            found, kept[setting] = (
                [path / name for name in _TOGETHER] if path.is_dir() else fetched,
                TOKENIZER,
            )
        try:
            files |= {each.name: each.read_bytes() for each in found if each.is_file()}
        except OSError as error:
            remedy = "check its permissions, and check the disk for errors"
            raise DataError(f"{path} cannot be read: {error.strerror or error}", remedy=remedy) from error
    return files, kept if files else {}


def _with_siblings(path: Path) -> list[Path]:
    return [path.with_name(name) for name in _TOGETHER] if path.name in _TOGETHER else [path]
