"""What a rank's optimizer has, for any host: flat ranges of parameters, with their float32 numbers and
moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_hyperrouter.checkpoint.optimizer import MASTER, MOMENTS
from megatron_hyperrouter.model.names import matrices, matrix_names, router_parameter
from megatron_hyperrouter.model.sharding import (
    is_second_copy,
    replica_place,
    shard_of,
    tensor_parallel_place,
)
from megatron_hyperrouter.routers.base import Router


@dataclass
class StatePiece:
    """The part of one parameter whose optimizer state is on this rank."""

    name: str  # global
    parameter: Tensor  # this rank's tensor-parallel piece of it
    start: int  # of the part, among the parameter's row-major numbers
    fields: dict[str, Tensor]  # MASTER and MOMENTS -> the part's numbers, in one row; to be read or filled
    adam: torch.optim.Optimizer
    main: Tensor  # the key of ``adam.state``

    @property
    def end(self) -> int:
        """The first number after the part."""
        return self.start + len(self.fields[MASTER])

    def by_matrix(self) -> Iterator[StatePiece]:
        """The piece itself; for a parameter that stacks the matrices of several experts, one piece for each
        matrix.
        """
        names = matrix_names(self.name)
        if not names:
            yield self
            return
        whole = self.parameter.detach().unbind()
        for number, (name, matrix) in enumerate(zip(names, whole, strict=True)):
            first = number * matrix.numel()
            begin, end = max(self.start, first), min(self.end, first + matrix.numel())
            if begin < end:
                rows = {key: row[begin - self.start : end - self.start] for key, row in self.fields.items()}
                yield StatePiece(name, matrix, begin - first, rows, self.adam, self.main)

    @property
    def steps(self) -> int:
        """Steps that the optimizer took; apex and Transformer Engine count them for each group."""
        state = self.adam.state[self.main]
        return int(state["step"] if "step" in state else self._group().get("step", 0))

    def set_steps(self, steps: int) -> None:
        """The opposite of :attr:`steps`."""
        state = self.adam.state[self.main]
        if "step" not in state:
            self._group()["step"] = steps
        elif isinstance(state["step"], Tensor):
            state["step"].fill_(steps)
        else:
            state["step"] = steps

    @property
    def counter(self) -> int:
        """Equal for pieces that share one count of steps."""
        return id(self.main if "step" in self.adam.state[self.main] else self._group())

    def _group(self) -> dict[str, Any]:
        return next(
            group for group in self.adam.param_groups if any(self.main is each for each in group["params"])
        )


def piece(
    name: str,
    parameter: nn.Parameter,
    adam: torch.optim.Optimizer,
    main: Tensor,
    *,
    start: int = 0,
    part: tuple[int, int] | None = None,
) -> StatePiece:
    """``main``: the optimizer's own tensor; ``part``: (start, length) in it where it contains other
    parameters, too.
    """
    _make_moments(adam, main)
    begin, length = part or (0, main.numel())
    rows = {MASTER: main.detach(), **{moment: adam.state[main][moment] for moment in MOMENTS}}
    fields = {field: row.view(-1).narrow(0, begin, length) for field, row in rows.items()}
    return StatePiece(name, parameter, start, fields, adam, main)


def _make_moments(adam: torch.optim.Optimizer, main: Tensor) -> None:
    """Create Adam's state, which Adam itself creates only in the first step."""
    state = adam.state[main]
    if MOMENTS[0] in state:
        return
    if isinstance(adam, torch.optim.Adam):
        group = next(group for group in adam.param_groups if any(main is each for each in group["params"]))
        on_device = group.get("capturable") or group.get("fused")
        state["step"] = torch.zeros((), dtype=torch.float32, device=main.device if on_device else "cpu")
    for moment in MOMENTS:
        state[moment] = torch.zeros_like(main, memory_format=torch.preserve_format)


class Holding(NamedTuple):
    """The part of the model and of the optimizer that a rank holds."""

    named: list[tuple[str, nn.Parameter]]  # global names; routers' parameters as well
    routers: dict[str, Router]  # prefix of the global names -> router
    pieces: Callable[[], Iterable[StatePiece]] | None  # of the optimizer; None if there is none
    spread: bool  # the host gives each data-parallel rank another part of the optimizer's state
    device: torch.device


def weights(holding: Holding) -> Iterator[tuple[str, Tensor]]:
    """This rank's pieces of all weights, and the whole state of its routers."""
    for name, parameter in matrices(holding.named):
        if router_parameter(name) is None:
            yield name, parameter.detach()
    for prefix, router in holding.routers.items():
        for name, tensor in router.state_dict().items():
            yield prefix + name, tensor


def share(name: str, count: int, *, spread: bool = False) -> tuple[int, int]:
    """Which of its ``count`` values of a tensor this rank writes: each value of the whole tensor is written
    by exactly one rank.

    Numbers that all data-parallel ranks have are written by all of them in equal parts; ``spread``: no two of
    them have the same numbers.
    """
    if is_second_copy(name):
        return 0, 0
    if shard_of(name) is None and tensor_parallel_place(name)[1] != 0:
        return 0, 0  # norms and routers are whole on every tensor-parallel rank
    if spread:
        return 0, count
    size, place = replica_place(name)
    return count * place // size, count * (place + 1) // size
