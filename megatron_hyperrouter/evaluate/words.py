"""Perplexity per word, which allows comparisons between models with different tokenizers."""

from __future__ import annotations

import math

from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.order.blend import parse_blend
from megatron_hyperrouter.data.store.manifest import manifest_of


def words_per_token(data: DataConfig, split: str) -> float | None:
    """Words over tokens of the files that a split is read from; None if one of them has no manifest that
    counts its words.
    """
    named = data.data_path or getattr(data, f"{split}_data_path")
    if not named:
        return None
    words = tokens = 0
    for prefix in parse_blend(named, flag="--data-path").prefixes:
        manifest = manifest_of(prefix)
        if manifest is None or not manifest.words:
            return None
        words, tokens = words + manifest.words, tokens + manifest.tokens
    return words / tokens


def word_perplexity(loss: float, ratio: float) -> float:
    """From the loss in nats per token and the words per token."""
    return math.exp(loss / ratio) if loss / ratio < 700 else math.inf
