"""Parameters and memory of the ranks of one given layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_hyperrouter.model.spec import padded_vocab_size
from megatron_hyperrouter.planning.held.frozen import frozen_of
from megatron_hyperrouter.planning.held.memory import PARTS, Estimator
from megatron_hyperrouter.planning.held.parameters import Model, model_of, parameters_of_ranks
from megatron_hyperrouter.planning.layouts import Candidate
from megatron_hyperrouter.planning.machine import Machine

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig

_GIB = 2.0**30


def holdings(config: RunConfig, vocab_size: int, world_size: int) -> tuple[Model, list[tuple[str, str]]]:
    """The model, and lines (label, text) about parameters and memory of its ranks; ``vocab_size``: ids of the
    tokenizer, 0 if they are not known.
    """
    model = model_of(config, vocab_size)
    counts = sorted(set(parameters_of_ranks(model, config, world_size)))
    machine = Machine(memory=0.0, per_node=1, reserve=0.0)
    rows = padded_vocab_size(vocab_size, config)
    use = Estimator(model, frozen_of(config, vocab_size), rows, machine).fullest(
        Candidate(config, world_size)
    )
    parts = [
        f"{name} {getattr(use, name) / _GIB:.3g}" for name in PARTS if getattr(use, name) >= 0.001 * use.total
    ]
    held = f"{counts[0]:,} parameters" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,} parameters"
    needed = f"about {use.total / _GIB:.3g} GiB on the rank that needs the most: {', '.join(parts)}"
    return model, [("per rank", held), ("memory", needed)]
