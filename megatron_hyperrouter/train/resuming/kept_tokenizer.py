"""The tokenizer in a checkpoint, for a run whose own file of it is no longer where it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter import console
from megatron_hyperrouter.checkpoint.description import TOKENIZER, tokenizer_paths
from megatron_hyperrouter.config.reading.yaml_text import parse_yaml
from megatron_hyperrouter.train.resuming.saved_settings import saved_settings

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.train.resuming.start import Start


def with_kept_tokenizer(config: RunConfig, start: Start) -> RunConfig:
    """The settings with the tokenizer in the checkpoint, if they name the file that the checkpoint's run used
    and there is no such file now.  Another file that is missing stays an error.
    """
    if start.folder is None:
        return config
    kept = start.manifest["meta"].get("tokenizer", {}).get("kept", {})
    gone = {name: path for name, path in tokenizer_paths(config).items() if not Path(path).exists()}
    text = saved_settings(start.folder, start.manifest["files"]) if gone and kept else ""
    saved = parse_yaml(text) or {}
    paths: dict[str, Any] = {
        name: str(start.folder / kept[name])
        for name, path in gone.items()
        if name in kept and _is_same(path, str(saved.get(name, "")))
    }
    if not paths:
        return config
    if console.speaks():
        shown = ", ".join(gone[name] for name in paths)
        console.note(f"{shown} does not exist; using the tokenizer in {start.folder}")
    return replace(config, data=replace(config.data, **paths))


def _is_same(path: str, saved: str) -> bool:
    """Also if the run of the checkpoint already used the copy in an earlier checkpoint."""
    copy = Path(saved)
    return path == saved or (copy.parent.name == TOKENIZER and copy.name == Path(path).name)
