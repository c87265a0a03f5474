"""Faults that mhr verify must find: its own tests put them into a layout with ``fault=NAME``.

Each of them can occur in a distributed trainer. None affects the one-process reference.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig

FAULTS = {
    "expert-gradient": "gradients of experts multiplied by EP",
    "embedding-reduce": "the first and last pipeline stage do not add up the gradients of the embedding "
    "that they share",
    "aux-loss": "the auxiliary loss multiplied by TP",
    "hypernetwork": "the last rank draws a different hypernetwork",
}


def settings_with(fault: str, config: RunConfig, *, rank: int, world_size: int) -> RunConfig:
    """The settings of this rank."""
    from megatron_hyperrouter.config.cli import replace_leaves

    if fault == "hypernetwork" and rank == world_size - 1:
        return replace_leaves(config, **{"router.seed": config.train.seed + 1})
    return config


@contextlib.contextmanager
def around(fault: str, config: RunConfig) -> Iterator[None]:
    """A context in which the engine is built and used."""
    with contextlib.ExitStack() as stack:
        if fault == "embedding-reduce" and config.engine.engine == "megatron":
            # A name that is both a function of the package and a module
            module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
            stack.enter_context(
                patch.object(module, "_allreduce_word_embedding_grads", lambda *args, **kwargs: None)
            )
        elif fault == "embedding-reduce":
            from deepspeed.runtime.pipe.module import PipelineModule

            stack.enter_context(patch.object(PipelineModule, "get_tied_weights_and_groups", lambda self: []))
        elif fault == "aux-loss":
            from megatron_hyperrouter.engines import statistics
            from megatron_hyperrouter.ops import balance
            from megatron_hyperrouter.routers import base

            honest = balance.switch_loss

            def too_large(*args: Any, **kwargs: Any) -> Any:
                return config.parallel.tensor_model_parallel_size * honest(*args, **kwargs)

            users = [
                module for module in sys.modules.values() if getattr(module, "switch_loss", None) is honest
            ]
            assert statistics in users and base in users
            for module in users:  # each holds the name by itself
                stack.enter_context(patch.object(module, "switch_loss", too_large))
        yield


def inside(fault: str, config: RunConfig, engine: Any) -> None:
    """Inject the fault into an engine that is complete."""
    from megatron_hyperrouter.model.names import is_expert

    if fault == "expert-gradient":
        for name, parameter in engine.named_parameters():
            if is_expert(name):
                parameter.register_hook(
                    lambda gradient: gradient * config.parallel.expert_model_parallel_size
                )
