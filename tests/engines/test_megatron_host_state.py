"""Optimizer state of the Megatron engine: optimizers that count steps by group, and checkpoints of other
layers.
"""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_hyperrouter.engines.megatron import host_state
from megatron_hyperrouter.engines.saved.pieces import StatePiece
from megatron_hyperrouter.errors import CheckpointError


class GroupAdam(torch.optim.Optimizer):
    """Adam as apex and Transformer Engine have it: one step count for a group, moments for each parameter."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                for name, decay, power in (("exp_avg", 0.9, 1), ("exp_avg_sq", 0.99, 2)):
                    state[name] = decay * state.get(name, 0.0) + (1 - decay) * parameter.grad**power
                first = state["exp_avg"] / (1 - 0.9 ** group["step"])
                parameter -= (
                    group["lr"] * first / ((state["exp_avg_sq"] / (1 - 0.99 ** group["step"])).sqrt() + 1e-8)
                )


def host(optimizer: type[torch.optim.Optimizer]) -> Any:
    """As megatron-core chains it."""
    torch.manual_seed(1)
    inner = optimizer([torch.nn.Parameter(torch.randn(4))])  # type: ignore[call-arg]
    return SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=inner)])


def steps(chained: Any, first: int, last: int) -> torch.Tensor:
    (part,) = chained.chained_optimizers
    (parameter,) = part.optimizer.param_groups[0]["params"]
    for number in range(first, last):
        parameter.grad = torch.linspace(-1, number, 4)
        part.optimizer.step()
    return parameter.detach().clone()


def pieces_of(chained: Any) -> list[StatePiece]:
    (part,) = chained.chained_optimizers
    named = [("a.weight", part.optimizer.param_groups[0]["params"][0])]
    return list(host_state.pieces(chained, named))


@pytest.mark.parametrize("optimizer", [GroupAdam, torch.optim.AdamW, partial(torch.optim.AdamW, fused=True)])
def test_a_fresh_optimizer_that_is_filled_continues_bit_for_bit(optimizer: Any) -> None:
    first = host(optimizer)
    steps(first, 0, 3)
    second = host(optimizer)
    (own,), (other,) = pieces_of(first), pieces_of(second)
    assert (own.steps, other.steps, own.start, own.end) == (3, 0, 0, 4)
    other.set_steps(own.steps)
    for field, row in own.fields.items():
        other.fields[field].copy_(row)
    assert torch.equal(steps(second, 3, 6), steps(first, 3, 6))


def state_of(chained: Any, layers: str) -> dict[str, Any]:
    """As format 1 had it."""
    (part,) = chained.chained_optimizers
    adam = part.optimizer
    parameters = [
        {"value": parameter.detach().clone(), **copy.deepcopy(adam.state[parameter])}
        for parameter in adam.param_groups[0]["params"]
    ]
    steps_of_groups = [group.get("step") for group in adam.param_groups]
    return {"layers": layers, "parts": [{"parameters": parameters, "steps": steps_of_groups}]}


@pytest.mark.parametrize("optimizer", [GroupAdam, torch.optim.AdamW])
def test_format_1_continues_bit_for_bit(optimizer: Any) -> None:
    first = host(optimizer)
    steps(first, 0, 3)
    second = host(optimizer)
    host_state.load_format_1(second, state_of(first, "local"), layers="local")
    assert torch.equal(steps(second, 3, 6), steps(first, 3, 6))


def test_format_1_of_other_layers_is_refused() -> None:
    """Their parameters stand in another order, and some have the same shapes."""
    state = state_of(host(GroupAdam), "transformer_engine")
    with pytest.raises(
        CheckpointError,
        match="was written with --transformer-impl transformer_engine, but this run uses local",
    ) as caught:
        host_state.load_format_1(host(GroupAdam), state, layers="local")
    assert "--finetune" in caught.value.remedy
