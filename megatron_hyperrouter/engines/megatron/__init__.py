"""The Megatron engine: megatron-core's GPTModel and MoELayer, with our routers in their router slot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_hyperrouter.compat.megatron import install
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
    install()  # before anything of megatron-core binds what it patches
    from megatron_hyperrouter.engines.megatron.engine import MegatronEngine

    return MegatronEngine(
        config, vocab_size=vocab_size, eod=eod, for_training=for_training, classifier=classifier
    )
