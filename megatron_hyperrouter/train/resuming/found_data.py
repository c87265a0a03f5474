"""The data files of a run that continues from another folder than the one in which it was started."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter import console
from megatron_hyperrouter.checkpoint.description import places
from megatron_hyperrouter.config.schedules.mixes import inline, scheduled
from megatron_hyperrouter.data.store.token_files import IndexedDataset
from megatron_hyperrouter.data.stream.file_identity import identity, same

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
    mixes = () if config.data.data_schedule is None else scheduled(config.data)
    blends = [*(getattr(config.data, name) for name in _PATHS), *(path for _, path in mixes)]
    found = dict[str, str]()
    for word in dict.fromkeys(word for words in blends for word in words):
        name = _name_of(word, meta.get("files", {}))
        if name is None or _is_there(word):
            continue
        around = filter(_is_there, places(name, meta.get("origin", {}), run_dir))
        place = next((each for each in around if _is_same(meta["files"][name], each)), None)
        if place is not None:
            found[word] = place
            console.note(f"{word} does not exist; using {place}, the same file at another place")
    if not found:
        return config

    def now(words: Sequence[str]) -> tuple[str, ...]:
        return tuple(found.get(word, word) for word in words)

    changes: dict[str, Any] = {name: now(getattr(config.data, name)) for name in _PATHS}
    if mixes:
        changes["data_schedule"] = inline([(step, now(path)) for step, path in mixes])
    return replace(config, data=replace(config.data, **changes))


def _name_of(word: str, files: Collection[str]) -> str | None:
    """The name under which the run has read the file.  A run that has continued elsewhere before knows the
    file by a longer path than its first command.
    """
    parts = Path(word).parts
    names = [word] if word in files else [name for name in files if Path(name).parts[-len(parts) :] == parts]
    return names[0] if len(names) == 1 else None


def _is_there(prefix: str) -> bool:
    return Path(f"{prefix}.idx").is_file()


def _is_same(known: dict[str, Any], prefix: str) -> bool:
    """Whether a file is the one that the run has read."""
    return same(known, identity(IndexedDataset(prefix, whole=False)))
