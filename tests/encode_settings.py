"""Settings of preprocessing in one line."""

from __future__ import annotations

from typing import Any

from megatron_hyperrouter.data.tokenize.encode import EncodeSettings
from megatron_hyperrouter.data.tokenize.tokenizer import TokenizerOptions


def settings(
    kind: str,
    model: str | None = None,
    keys: tuple[str, ...] = ("text",),
    append_eod: bool = False,
    **more: Any,
) -> EncodeSettings:
    """A tokenizer of this type and file, and how to use it."""
    return EncodeSettings(TokenizerOptions(kind, model), keys, append_eod, **more)
