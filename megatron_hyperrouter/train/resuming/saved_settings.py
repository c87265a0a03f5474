"""Reads the settings that a checkpoint contains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hyperrouter.checkpoint.description import settings_file
from megatron_hyperrouter.checkpoint.folder import older
from megatron_hyperrouter.config.reading.yaml_text import parse_yaml
from megatron_hyperrouter.errors import CheckpointError, reason_of


def saved_settings(folder: Path, files: Mapping[str, Any]) -> str:
    """The settings in a checkpoint, YAML; empty in one of an older version.

    ``files``: those that its manifest lists.
    """
    path = settings_file(folder, files)
    if path is None:
        return ""
    try:
        text = path.read_text(encoding="utf-8")
        parse_yaml(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}", remedy=older(folder)) from error
    return text
