"""Settings by flat name as a checked RunConfig."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from megatron_hyperrouter.checkpoint.description import Description, describe
from megatron_hyperrouter.config.cli import dump, load_file
from megatron_hyperrouter.config.derived import NO_DATA
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.data.tokenize.tokenizer import tokenizer_of
from megatron_hyperrouter.data.tokenize.transformers_files import is_byte_tokenizer
from megatron_hyperrouter.paths import unexpanded
from megatron_hyperrouter.routers import ROUTERS

_PATHS = ("run_dir", "data_path", "tokenizer_model", "vocab_file", "merge_file")


def run_of(settings: Mapping[str, Any]) -> RunConfig:
    """The run that these settings describe; ConfigError with every problem at once."""
    with tempfile.TemporaryDirectory(prefix="mhr-settings-") as folder:
        path = Path(folder) / "settings.yaml"
        values = {name: _to_write(name, value) for name, value in settings.items()}
        path.write_text(yaml.safe_dump({"data_path": [NO_DATA], **values}), encoding="utf-8")
        return load_file(path, routers=ROUTERS, world_size=1)


def _to_write(name: str, value: Any) -> Any:
    """The value of a setting as a file has it, where variables in paths are expanded."""
    if name not in _PATHS or value is None:
        return value
    return unexpanded(value) if isinstance(value, str) else [unexpanded(word) for word in value]


def train_command(run: Path) -> str:
    """The start of the command that trains the imported run."""
    config, load = (shlex.quote(unexpanded(path)) for path in (run / "config.yaml", run))
    return f"mhr train --config {config} --load {load} --finetune"


def router_names() -> list[str]:
    """The names of all routers."""
    return sorted(ROUTERS)


def has_data(run: RunConfig) -> bool:
    """Whether the run names data; an imported run may have none."""
    return run.data.data_path != (NO_DATA,)


def tokenizer_settings(file: Path, rows: int) -> dict[str, Any]:
    """The settings of the tokenizer in ``file``; if there is no such file, those of a tokenizer with one id
    per row.
    """
    if not file.is_file():
        return {"tokenizer_type": "NullTokenizer", "vocab_size": rows - 1}  # the last row ends a document
    if is_byte_tokenizer(file):
        return {"tokenizer_type": "ByteTokenizer"}
    return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(file.resolve())}


def described_run(run: RunConfig) -> Description:
    """The checkpoint's description of the run, including its tokenizer."""
    return describe(run, tokenizer=tokenizer_of(run.data).identity())


def text_of(run: RunConfig) -> str:
    """``config.yaml``; training a run without data needs --data-path or --mock-data."""
    return dump(run if has_data(run) else replace(run, data=replace(run.data, data_path=())))
