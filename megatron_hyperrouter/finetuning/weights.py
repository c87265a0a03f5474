"""Keeps the weights of a model, and puts them back with a new head for the next seed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from megatron_hyperrouter.checkpoint.optimizer import MOMENTS
from megatron_hyperrouter.engines.routing import draw_by_name
from megatron_hyperrouter.model.names import CLASSIFIER
from megatron_hyperrouter.model.parallel import seed_dropout

if TYPE_CHECKING:
    from megatron_hyperrouter.engines.shared import SharedEngine


class Kept(NamedTuple):
    """What this rank trains, and the state of its routers, in CPU memory."""

    weights: dict[str, Tensor]
    routers: dict[str, dict[str, Any]]


def keep(engine: SharedEngine) -> Kept:
    """A copy of what training changes."""
    weights = {
        name: parameter.detach().cpu().clone()
        for name, parameter in engine.holding().named
        if parameter.requires_grad
    }
    routers = {
        name: {key: value.detach().cpu().clone() for key, value in router.state_dict().items()}
        for name, router in engine.routers.items()
    }
    return Kept(weights, routers)


@torch.no_grad()
def put_back(engine: SharedEngine, kept: Kept) -> None:
    """Restore the kept weights in the model and in the optimizer's copies."""
    for name, parameter in engine.holding().named:
        if name in kept.weights:
            parameter.copy_(kept.weights[name])
    for name, router in engine.routers.items():
        router.load_state_dict(kept.routers[name])
    engine.take_weights_over()
    engine.weights_changed()


@torch.no_grad()
def start_again(engine: SharedEngine, kept: Kept, *, seed: int) -> None:
    """The weights that were kept, a head and dropout drawn by ``seed``, and an optimizer with empty
    moments.

    A matrix of the head is N(0, 1 / inputs): the run's own initial weights may be so small that a short
    fine-tuning of a narrow model learns nothing.
    """
    put_back(engine, kept)
    held = engine.holding()
    draw = draw_by_name(seed)
    for name, parameter in held.named:
        if not name.startswith(CLASSIFIER):
            continue
        if parameter.dim() == 1:
            parameter.zero_()
        else:
            parameter.copy_(draw(name, tuple(parameter.shape)) * parameter.size(1) ** -0.5)
    engine.take_weights_over()
    for piece in held.pieces() if held.pieces else ():
        for moment in MOMENTS:
            piece.fields[moment].zero_()
        piece.set_steps(0)
    seed_dropout(engine.config, seed=seed)
