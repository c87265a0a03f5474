"""The engines: one protocol, and one room for each host."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.compat.host_logs import silence_hosts
from megatron_hyperrouter.compat.megatron import import_without_compiler
from megatron_hyperrouter.compat.transformer_engine import implementation
from megatron_hyperrouter.compat.versions import check
from megatron_hyperrouter.config.derived import resets_documents, separates_documents
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
    """Build the model of ``config`` in its engine; ``for_training=False`` omits the optimizer.

    ``vocab_size``: number of token ids; ``eod``: the id that ends a document, needed if the settings
    separate documents.  ``classifier``: replaces the output matrix.  The host is imported here, so that
    settings can be checked without it.  Raises HostError if it is missing.
    """
    if eod is None and separates_documents(config):
        raise ValueError(
            "with these settings the engine must know where documents end; pass eod, the end-of-document id"
        )
    silence_hosts()
    check(config.engine.engine)
    import_without_compiler()
    if config.engine.engine == "megatron":
        wanted = config.engine.transformer_impl
        if wanted == "auto" and resets_documents(config):
            wanted = "local"  # Transformer Engine's attention does not keep documents apart
        chosen: Any = implementation(wanted, bf16=config.train.bf16, fp8=_fp8_recipe(config))
        config = replace(config, engine=replace(config.engine, transformer_impl=chosen))
    room = importlib.import_module(f"{__name__}.{config.engine.engine}")
    engine: Engine = room.open_engine(
        config, vocab_size=vocab_size, eod=eod, for_training=for_training, classifier=classifier
    )
    return engine


def _fp8_recipe(config: RunConfig) -> str | None:
    return config.precision.fp8_recipe if config.precision.fp8_format else None
