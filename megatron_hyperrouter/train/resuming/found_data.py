"""The data files of a run that continues from another folder than the one in which it was started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter import console
from megatron_hyperrouter.checkpoint.description import places

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.train.resuming.start import Start

_PATHS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")


def with_found_data(config: RunConfig, start: Start) -> RunConfig:
    """The settings with the files that the checkpoint's run has read, if its paths do not lead to them from
    here.  Another file that is missing stays an error.
    """
    if start.folder is None or not start.step:
        return config
    meta, run_dir = start.manifest["meta"], start.folder.absolute().parent.parent
    found = dict[str, str]()
    for word in meta.get("files", {}):
        around = places(word, meta.get("origin", {}), run_dir)
        if not _is_there(word) and (place := next(filter(_is_there, around), None)):
            found[word] = place
    paths: dict[str, Any] = {
        name: tuple(found.get(word, word) for word in words)
        for name in _PATHS
        if set(words := getattr(config.data, name)) & set(found)
    }
    if not paths:
        return config
    if console.speaks():
        for word, place in found.items():
            console.note(f"{word} does not exist in this folder; using {place}, which this run has read")
    return replace(config, data=replace(config.data, **paths))


def _is_there(prefix: str) -> bool:
    return Path(f"{prefix}.idx").is_file()
