"""Watches routers during an engine's evaluation, and keeps a sample of their inputs and choices.

Legend: ``T`` tokens of a micro-batch, ``N`` tokens of the sample, ``D`` hidden size, ``E`` experts, ``K``
active experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_hyperrouter.engines.statistics import RouterStatistics
from megatron_hyperrouter.routers.base import Pass, Router, Routing, Tokens

Observer = Callable[
    [Router, Routing, Tensor, Pass], None
]  # the router, its decision, its input x_TD, the pass


_GOLDEN = (5**0.5 - 1) / 2


@contextmanager
def watching(routers: Iterable[Router], see: Observer) -> Iterator[None]:
    """Within this context, ``see`` is called with each decision of each router.  The decisions stay as
    they are.
    """
    with ExitStack() as stack:
        for router in routers:
            stack.enter_context(_watched(router, see))
        yield


@contextmanager
def _watched(router: Router, see: Observer) -> Iterator[None]:
    own = router.refine

    def refine(first: Routing, x_TD: Tensor, now: Pass) -> Routing:
        routing = own(first, x_TD, now)
        see(router, routing, x_TD, now)
        return routing

    router.refine = refine  # type: ignore[method-assign]
    try:
        yield
    finally:
        del router.refine


@dataclass
class Sample:
    """Tokens from all parts of an evaluation, as one layer's router saw them."""

    router: Router
    inputs: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)
    tokens: list[Tokens] = field(default_factory=list)  # empty if the engine does not provide them
    step: int = 0
    k: int = 1
    seen: int = 0  # tokens of the micro-batches so far

    def add(self, routing: Routing, x_TD: Tensor, now: Pass, every: int) -> None:
        """Keep one of each ``every`` tokens."""
        self.step, self.k = now.step, now.k
        rows_N = chosen(every, self.seen, self.seen + x_TD.size(0)).to(x_TD.device)
        self.seen += x_TD.size(0)
        self.inputs.append(x_TD[rows_N].detach().float())
        self.weights.append(routing.weights_TK[rows_N].detach())
        self.experts.append(routing.experts_TK[rows_N])
        if now.tokens is not None:
            ids_T, places_T, seq_length, _ = now.tokens
            self.tokens.append(Tokens(ids_T[rows_N], places_T[rows_N], seq_length))

    @property
    def x_ND(self) -> Tensor:
        """The router's input."""
        return torch.cat(self.inputs)

    @property
    def experts_NK(self) -> Tensor:
        """The chosen experts."""
        return torch.cat(self.experts)

    @property
    def weights_NK(self) -> Tensor:
        """Their weights."""
        return torch.cat(self.weights)

    def first(self, count: int) -> Sample:
        """A sample of at most ``count`` of these tokens, evenly spaced."""
        every = max(-(-sum(map(len, self.inputs)) // count), 1)
        thin = Sample(self.router, step=self.step, k=self.k)
        thin.inputs, thin.weights = [self.x_ND[::every]], [self.weights_NK[::every]]
        thin.experts = [self.experts_NK[::every]]
        if self.tokens:
            ids_N, places_N = (
                torch.cat([getattr(t, name) for t in self.tokens])[::every] for name in ("ids_T", "places_T")
            )
            thin.tokens = [Tokens(ids_N, places_N, self.tokens[0].seq_length)]
        return thin


def chosen(every: int, begin: int, end: int) -> Tensor:
    """Which tokens from ``begin`` to ``end`` a sample has, counted from ``begin``: one of each block of
    ``every`` tokens.

    The place in the block follows multiples of the golden ratio.  The same place in each block would often be
    the same position in each sequence, such as the first, which has no context.
    """
    blocks_N = torch.arange(begin // every, -(-end // every), dtype=torch.float64)
    places_N = (every * (blocks_N + blocks_N * _GOLDEN % 1)).floor().long()
    return places_N[(places_N >= begin) & (places_N < end)] - begin


class Witness:
    """Counts what routers choose, and keeps a sample of their tokens."""

    def __init__(self, routers: Iterable[Router], *, every: int) -> None:
        """``every``: the sample has one of each n tokens."""
        self.every = every
        self.samples = {router.layer_number: Sample(router) for router in routers}
        found = [sample.router for sample in self.samples.values()]
        self._statistics = RouterStatistics(max(self.samples), found[0].num_experts)
        self._statistics.make_room(max(router.num_extra_counts for router in found))

    def see(self, router: Router, routing: Routing, x_TD: Tensor, now: Pass) -> None:
        """One micro-batch; for :func:`watching`."""
        self._statistics.record(router, routing)
        self.samples[router.layer_number].add(routing, x_TD, now, self.every)

    def measures(self) -> dict[int, dict[str, float]]:
        """Layer number -> the measures of ``engines.statistics`` over all tokens."""
        sums = self._statistics.sums
        columns = self._statistics.summary(sums)
        layers = [int(index) + 1 for index in self._statistics.routed(sums)]
        return {
            layer: {name: values[at] for name, values in columns.items()} for at, layer in enumerate(layers)
        }

    def loads(self) -> dict[int, list[float]]:
        """Layer number -> each expert's share of the routes, times the number of experts: 1 when even."""
        found = {}
        for layer, sample in self.samples.items():
            load_E = self._statistics.sums[layer - 1, : sample.router.num_experts]
            found[layer] = (load_E / load_E.mean()).tolist()
        return found
