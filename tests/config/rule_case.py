"""What a case of a rule is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PACKED = {"pack_documents": True, "reset_attention_mask": True, "eod_mask_loss": True}
MEGATRON = {"engine": "megatron"}
FP8 = {**MEGATRON, "bf16": True, "fp8_format": "hybrid"}
TP2 = {"tensor_model_parallel_size": 2}


@dataclass(frozen=True)
class Case:
    """Settings that one rule refuses, and a change that mends them."""

    rule: str
    settings: dict[str, Any]
    field: str
    words: str  # part of the rule's text
    mended: dict[str, Any]
    world_size: int | None = None
    more: int = field(default=0)  # other problems of the same rule in the same settings


def case(
    rule: str,
    settings: dict[str, Any],
    field: str,
    words: str,
    mended: dict[str, Any],
    world: int | None = None,
    more: int = 0,
) -> Case:
    return Case(rule, settings, field, words, mended, world, more)
