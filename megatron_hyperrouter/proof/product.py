"""The run's side of a proof: its engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines import open_engine
from megatron_hyperrouter.evaluate.calibration import Scales, apply
from megatron_hyperrouter.proof.reference import greedy, write_reference


class Prompt(NamedTuple):
    """A text that both sides continue."""

    ids: list[int]
    topk: int
    new_tokens: int = 16


def product_side(
    run: RunConfig,
    checkpoint: Path,
    vocab_size: int,
    rows_BS: Tensor,
    topks: Sequence[int],
    folder: Path,
    prompt: Prompt | None = None,
    scales: Scales | None = None,
) -> dict[str, list[int]]:
    """Write logits and choices into ``folder``; returns the greedy text of ``prompt`` under its k.
    ``scales``: what the output of each layer is multiplied by.
    """
    engine = open_engine(run, vocab_size=vocab_size, for_training=False)
    try:
        engine.load(checkpoint, weights_only=True)
        with apply([] if scales is None else engine.routers.values(), scales or {}):
            write_reference(engine, rows_BS, topks, folder)
            if prompt is None:
                return {}
            length = rows_BS.size(1) - 1
            ids = greedy(
                engine,
                prompt.ids,
                prompt.new_tokens,
                topk=prompt.topk,
                length=length,
                vocab_size=vocab_size,
            )
            return {str(prompt.topk): ids}
    finally:
        engine.close()
