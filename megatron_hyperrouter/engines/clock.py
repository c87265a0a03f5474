"""What a layer's router needs from outside: the step, k during evaluation, and the tokens of the vectors.

Legend: ``B`` batch, ``S`` sequence, ``T = S * B`` tokens of a micro-batch on this rank, ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_hyperrouter.engines.base import RankPlace
from megatron_hyperrouter.engines.statistics import RouterStatistics, recomputing
from megatron_hyperrouter.model.attention.documents import document_starts
from megatron_hyperrouter.routers.base import ExpertBank, Pass, Router, Routing, Tokens


@dataclass
class Clock:
    """Set by the engine before each step, read by the layers."""

    step: int = 0  # completed optimizer steps
    topk: int | None = None  # overrides the schedule while evaluating
    turn: int = 0  # number of steps and evaluations begun; layers count their passes from 0 in each
    # of this rank's micro-batches, in order; empty if they are not known
    arrived: list[Tokens] = field(default_factory=list)
    eod: int | None = None  # id that ends a document; None if no setting needs documents
    dropless: bool = False  # drop no token, whatever the capacity: no token then depends on others
    balanced: bool = False  # send tokens to all experts in turn, and ignore the router's choice
    padded: bool = False  # negative ids are padding, which no router sees
    # of these micro-batches, where they are padded: the rows of the real tokens among the layers' vectors
    real: list[Tensor] = field(default_factory=list)
    # of these micro-batches: where the document of each token begins, _BS, uncut
    starts: list[Tensor] = field(default_factory=list)

    def begin(self, *, step: int, topk: int | None = None) -> None:
        """Begin a step, or an evaluation with ``topk``."""
        self.step, self.topk = step, topk
        self.turn += 1
        self.arrived, self.starts, self.real = [], [], []

    def starts_site(self) -> StartsSite:
        """An object that tells one more layer's attention where documents begin."""
        return StartsSite(self)

    def arrive(
        self,
        tokens_BS: Tensor,
        place: RankPlace,
        part: Callable[[Tensor], Tensor] | None = None,
        *,
        batch_first: bool = False,
    ) -> None:
        """Pass the next micro-batch; ``part`` selects the positions of a ``[B, S]`` tensor that this
        rank's routers process.

        ``batch_first``: hidden states are ``[B, S, D]``, not ``[S, B, D]``.
        """
        size, length = tokens_BS.shape
        if self.eod is not None:
            self.starts.append(document_starts(tokens_BS, self.eod))
        first = (len(self.arrived) * place.data_size + place.data_rank) * size
        places_BS = torch.arange(first * length, (first + size) * length, device=tokens_BS.device).view(
            size, length
        )
        if part is not None:
            tokens_BS, places_BS = part(tokens_BS), part(places_BS)
        if not batch_first:
            tokens_BS, places_BS = tokens_BS.t(), places_BS.t()
        ids_T, places_T = tokens_BS.flatten(), places_BS.flatten()
        if self.padded:
            self.real.append((ids_T >= 0).nonzero().flatten())
            ids_T, places_T = ids_T[self.real[-1]], places_T[self.real[-1]]
        self.arrived.append(Tokens(ids_T, places_T, length, size))


class Passes:
    """The number of the micro-batch that a layer is processing: micro-batches come in order on every
    pipeline stage, and so do their repetitions.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._turn = -1
        self._passes = [0, 0]  # first passes, and those that activation checkpointing repeats

    def next(self) -> int:
        """The number of the micro-batch, from 0; call it once in each pass."""
        number = self.coming()
        self._passes[recomputing()] += 1
        return number

    def coming(self) -> int:
        """The number of the micro-batch that :meth:`next` will give."""
        if self._turn != self.clock.turn:
            self._turn, self._passes = self.clock.turn, [0, 0]
        return self._passes[recomputing()]


class StartsSite:
    """Tells one layer's attention where the documents of its next micro-batch begin."""

    def __init__(self, clock: Clock) -> None:
        self._passes = Passes(clock)

    def __call__(self) -> Tensor:
        """``_BS``, of the whole sequence."""
        return self._passes.clock.starts[self._passes.next()]


class RouterSite:
    """A router in its layer, with what an engine adds."""

    def __init__(
        self, router: Router, *, clock: Clock | None = None, statistics: RouterStatistics | None = None
    ) -> None:
        self.router = router
        self.join(clock or Clock(), statistics)
        self._given: Routing | None = None

    def join(self, clock: Clock, statistics: RouterStatistics | None) -> None:
        """Use this clock from now on, and count there."""
        self.clock, self.statistics = clock, statistics
        self._passes = Passes(clock)

    def route(self, x_TD: Tensor, experts: ExpertBank | None = None) -> tuple[Routing, Pass]:
        """Route the next micro-batch, and count the choices."""
        asked: dict[str, Any] = {
            "step": self.clock.step,
            "topk": self.clock.topk,
            "experts": experts,
            "tokens": self._tokens(),
        }
        routing: Routing = self.router(x_TD, **asked)
        if self.clock.balanced:
            routing = evenly(routing)
        if self.statistics is not None:
            self.statistics.record(self.router, routing, own=not self.clock.balanced)
        return routing, self.router.at(**asked)

    def real_rows(self) -> Tensor | None:
        """The rows of the next micro-batch's vectors that are real tokens; None: all are."""
        return self.clock.real[self._passes.coming()] if self.clock.padded else None

    def routing(self, x_TD: Tensor) -> Routing:
        """The given decision, or the router's."""
        return self.route(x_TD)[0] if self._given is None else self._given

    @property
    def decided(self) -> bool:
        """True if a decision was given."""
        return self._given is not None

    @contextmanager
    def given(self, routing: Routing) -> Iterator[None]:
        """Within this context, the host dispatches by ``routing``."""
        self._given = routing
        try:
            yield
        finally:
            self._given = None

    def _tokens(self) -> Tokens | None:
        index, arrived = self._passes.next(), self.clock.arrived
        if arrived and index >= len(arrived):
            raise ValueError(
                f"layer {self.router.layer_number} begins forward pass {index + 1}, but arrive() was "
                f"called only {len(arrived)} times since the last begin() or begin_evaluation(); "
                "call arrive() before each forward pass"
            )
        return arrived[index] if arrived else None


def evenly(routing: Routing) -> Routing:
    """The same routing, but with the experts in turn, so that each gets the same number of tokens."""
    count, k = routing.experts_TK.shape
    routes_R = torch.arange(count * k, device=routing.experts_TK.device)
    return routing._replace(experts_TK=(routes_R % routing.logits_TE.size(1)).view(count, k))


def spread_out(real_RD: Tensor, rows_R: Tensor, like: Tensor) -> Tensor:
    """A tensor of the shape of ``like``, ``[..., D]``, with these rows; padding is 0."""
    whole_TD = real_RD.new_zeros(like.numel() // like.size(-1), like.size(-1))
    return whole_TD.index_copy(0, rows_R, real_RD).view(like.shape)


def single_routes(routing: Routing) -> Routing:
    """Each route as a separate token (``[T * K, 1]``) with weight 1, which brings unweighted outputs to
    the token's home rank.
    """
    experts_R1 = routing.experts_TK.reshape(-1, 1)
    ones_R1 = torch.ones_like(experts_R1, dtype=routing.weights_TK.dtype)
    logits_RE = routing.logits_TE.detach().repeat_interleave(routing.experts_TK.size(1), 0)
    return Routing(logits_RE, ones_R1, experts_R1, {})


def weighted_sum(weights_TK: Tensor, outputs_TKD: Tensor) -> Tensor:
    """The layer's output ``_TD``, in the outputs' dtype."""
    return (weights_TK.unsqueeze(-1) * outputs_TKD.float()).sum(1).to(outputs_TKD.dtype)
