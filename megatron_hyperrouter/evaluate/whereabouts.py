"""Where the files of a run are now: it may have been moved, or be used from another folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_hyperrouter import console
from megatron_hyperrouter.checkpoint.description import places, tokenizer_paths
from megatron_hyperrouter.config.tree import DataConfig, RunConfig
from megatron_hyperrouter.data.order.blend import parse_blend
from megatron_hyperrouter.data.store.token_files import IndexedDataset
from megatron_hyperrouter.data.stream.file_identity import identity, same

_PATHS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")


def start_folder(data: DataConfig, meta: Mapping[str, Any], run_dir: Path) -> str:
    """The folder from which the relative paths of a run's data lead to the files: where the run was started,
    or where that folder is now, if it was moved together with the run.
    """
    origin = meta.get("origin", {})
    then = str(origin.get("folder", Path.cwd()))
    words = [word for name in _PATHS for word in _prefixes(name, getattr(data, name))]
    folders = [then]
    if "run_dir" in origin:
        folders.append(os.path.normpath(os.path.join(run_dir, os.path.relpath(then, origin["run_dir"]))))
    return next(
        (each for each in folders if all(Path(each, f"{word}.idx").is_file() for word in words)), then
    )


def data_of(data: DataConfig, meta: Mapping[str, Any], run_dir: Path) -> DataConfig:
    """The data of a run at their present place; ``meta``: the description in its checkpoint."""

    def located(word: str) -> str:
        known = meta.get("files", {}).get(word)
        around = places(word, meta.get("origin", {}), run_dir)
        present = [place for place in around if Path(f"{place}.idx").is_file()]
        for place in present:
            if known is None or same(known, identity(IndexedDataset(place, whole=False))):
                return place
        if present:
            console.warn(f"{present[0]} has changed since the run read it")
        return present[0] if present else word

    return _named(data, {name: tuple(map(located, getattr(data, name))) for name in _PATHS})


def are_own(words: Sequence[str], data: DataConfig, meta: Mapping[str, Any]) -> bool:
    """Whether all of these are files of the run's ``--data-path``, wherever they are now."""
    known = meta.get("files", {})
    own = [known.get(word) for word in _prefixes("data_path", data.data_path)]
    given = [Path(prefix) for prefix in _prefixes("data_path", words)]
    if not own or None in own or not all(Path(f"{prefix}.idx").is_file() for prefix in given):
        return False  # the reader reports what is missing
    found = [identity(IndexedDataset(str(prefix), whole=False)) for prefix in given]
    return all(any(same(one, other) for one in own) for other in found)


def other_data(data: DataConfig, words: Sequence[str], *, divided: bool) -> DataConfig:
    """Other data: ``divided`` by the run's ``--split``, or all of them for every split."""
    given = ("data_path",) if divided else ("train_data_path", "valid_data_path", "test_data_path")
    paths = {name: tuple(words) if name in given else () for name in _PATHS}
    return _named(data, paths | {"mock_data": False})


def without_weights(data: DataConfig) -> DataConfig:
    """The same files without the weights of a blend, which a whole split does not need."""
    paths = {name: getattr(data, name) for name in _PATHS}
    return _named(data, {name: _prefixes(name, words) for name, words in paths.items()})


def with_tokenizer(
    settings: RunConfig, folder: Path, manifest: Mapping[str, Any], given: str | None
) -> RunConfig:
    """The settings, with the tokenizer where it is now: ``given``, or in the checkpoint, or where it was."""
    kept = manifest["meta"].get("tokenizer", {}).get("kept", {})
    origin = manifest["meta"].get("origin", {})
    paths = dict[str, Any]()
    for name, value in tokenizer_paths(settings).items():
        if name in kept:
            paths[name] = str(folder / kept[name])
        else:
            around = places(value, origin, folder.absolute().parent.parent)
            paths[name] = next((place for place in around if Path(place).exists()), value)
    if given is not None and not paths:
        console.warn(f"--tokenizer-model is ignored: {settings.data.tokenizer_type} needs no file")
    elif given is not None:
        paths["tokenizer_model"] = given
    return replace(settings, data=replace(settings.data, **paths))


def _prefixes(name: str, words: Sequence[str]) -> tuple[str, ...]:
    """The files of a setting, without the weights of a blend."""
    return tuple(parse_blend(words, flag=f"--{name.replace('_', '-')}").prefixes) if words else ()


def _named(data: DataConfig, paths: Mapping[str, Any]) -> DataConfig:
    return replace(data, **paths)
