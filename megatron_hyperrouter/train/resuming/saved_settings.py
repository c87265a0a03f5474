"""Reads the settings that a checkpoint contains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hyperrouter.checkpoint.description import SETTINGS
from megatron_hyperrouter.checkpoint.folder import damage, older
from megatron_hyperrouter.config.reading.yaml_text import parse_yaml
from megatron_hyperrouter.errors import CheckpointError, reason_of


def saved_settings(folder: Path, files: Mapping[str, Any]) -> str:
    """The settings in a checkpoint, YAML; empty in one of an older version.

    ``files``: those that its manifest lists; this one is compared here, because it is needed before the
    large ones are read.
    """
    path = folder / SETTINGS
    if SETTINGS not in files:
        return ""
    if wrong := damage(folder, {SETTINGS: files[SETTINGS]}):
        raise CheckpointError(wrong, remedy=older(folder))
    try:
        text = path.read_text(encoding="utf-8")
        parse_yaml(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}", remedy=older(folder)) from error
    return text
