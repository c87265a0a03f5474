"""The DeepSpeed engine: megatron-core layers, DeepSpeed-MoE in their MLP slot, ZeRO and pipeline stages
around them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.base import Engine

if TYPE_CHECKING:
    from megatron_hyperrouter.model.classifier import Classifier


def open_engine(
    config: RunConfig,
    *,
    vocab_size: int,
    eod: int | None = None,
    for_training: bool = True,
    classifier: Classifier | None = None,
) -> Engine:
    """See :func:`megatron_hyperrouter.engines.open_engine`."""
    # Not at the top: plug_into_deepspeed is in this room too, and does not need megatron-core.
    from megatron_hyperrouter.engines.deepspeed.engine import DeepSpeedEngine

    return DeepSpeedEngine(
        config, vocab_size=vocab_size, eod=eod, for_training=for_training, classifier=classifier
    )
