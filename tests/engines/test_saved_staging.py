"""What training waits for in a save: copies, and nothing between them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import world
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hyperrouter.checkpoint.optimizer import MOMENTS, Staged
from megatron_hyperrouter.engines.saved.pieces import Holding, piece
from megatron_hyperrouter.engines.saved.state import Memory, stage

COPY = torch.ops.aten.copy_.default
NAMES = ("decoder.final_layernorm.weight", "output_layer.weight")


class Operators(TorchDispatchMode):
    """Every operator that ran, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **kwargs or {})


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with world(tmp_path_factory.mktemp("world")):
        yield


def trained(*shapes: tuple[int, ...]) -> tuple[Holding, torch.optim.AdamW]:
    """Parameters of these shapes after one step, of which the first two numbers of each are known."""
    torch.manual_seed(3)
    named = [(name, nn.Parameter(torch.randn(shape))) for name, shape in zip(NAMES, shapes, strict=True)]
    adam = torch.optim.AdamW([parameter for _, parameter in named])
    train(named, adam)
    made = Holding(
        named=named,
        routers={},
        pieces=lambda: (piece(name, parameter, adam, parameter) for name, parameter in named),
        spread=False,
        device=torch.device("cpu"),
    )
    return made, adam


def train(named: list[tuple[str, nn.Parameter]], adam: torch.optim.AdamW) -> None:
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    adam.step()


def check(staged: Staged, holding: Holding, adam: torch.optim.AdamW, *, steps: int) -> None:
    """The staged numbers are those of the optimizer, in memory of their own."""
    for name, parameter in holding.named:
        assert torch.equal(staged.weights[name], parameter) and staged.weights[name] is not parameter
    assert [state.name for state in staged.states] == list(NAMES)
    for state, (_, parameter) in zip(staged.states, holding.named, strict=True):
        assert state.steps == steps and set(state.fields) == set(MOMENTS)
        for moment in MOMENTS:
            assert torch.equal(state.fields[moment], adam.state[parameter][moment].view(-1))


def test_nothing_runs_between_two_copies() -> None:
    holding, adam = trained((5,), (4, 3))
    memory = Memory()
    stage(0, 1, holding, memory, {})
    train(holding.named, adam)
    with Operators() as operators:
        staged = stage(0, 1, holding, memory, {})
    check(staged, holding, adam, steps=2)
    count = operators.seen.count(COPY)
    first = operators.seen.index(COPY)
    assert count == 6 and operators.seen[first : first + count] == [COPY] * count


def test_later_saves_use_the_memory_of_the_first(tmp_path: Path) -> None:
    holding, adam = trained((5,), (4, 3))
    memory = Memory()
    first = stage(0, 1, holding, memory, {})
    places = {name: tensor.data_ptr() for name, tensor in first.weights.items()}
    train(holding.named, adam)
    second = stage(0, 1, holding, memory, {})
    check(second, holding, adam, steps=2)
    assert {name: tensor.data_ptr() for name, tensor in second.weights.items()} == places


def test_an_optimizer_whose_state_is_replaced_is_saved_as_it_is_now() -> None:
    """As ``load_state_dict`` does: the next save must not copy from where the state was before."""
    holding, adam = trained((5,), (4, 3))
    memory = Memory()
    stage(0, 1, holding, memory, {})
    adam.load_state_dict(adam.state_dict())
    holding.named[0][1].data = holding.named[0][1].detach().clone()
    train(holding.named, adam)
    check(stage(0, 1, holding, memory, {}), holding, adam, steps=2)
