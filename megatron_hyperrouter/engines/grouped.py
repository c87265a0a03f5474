"""The experts of a rank as one module with two parameters, and the exchange of tokens with experts on
other ranks.

Legend: ``T`` tokens of this rank, ``K`` active experts, ``D`` hidden size, ``P`` ranks that share one
expert (expert tensor parallelism), ``N`` ranks that share all experts, ``L`` experts on each of them,
``R`` routes (``T * K * P``) or rows that came from other ranks, ``F`` width of an expert on this rank, ``G
= 2 F``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_hyperrouter.config.derived import expert_tensor_size, expert_width
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.model.parallel import expert_group
from megatron_hyperrouter.model.spec import parameter_dtype
from megatron_hyperrouter.ops.grouped import RoutesByExpert, collect, experts, sort_by_expert, spread


class Sharing(NamedTuple):
    """The ranks that share all experts; in ``group``, the ranks that share one expert are neighbours."""

    group: dist.ProcessGroup | None = None  # None: this rank has all experts
    parts: int = 1  # ranks that share one expert, each with a slice of its width

    @property
    def ranks(self) -> int:
        """Ranks in the group."""
        return 1 if self.group is None else self.group.size()


def sharing_of(run: RunConfig) -> Sharing:
    """The ranks that share the experts of a run; needs the parallel groups."""
    return Sharing(expert_group(), expert_tensor_size(run))


class GroupedExperts(nn.Module):
    """SwiGLU experts with stacked matrices: one parameter for all experts of the rank.

    ``model/names.py`` gives each matrix a global name.  A slice of an expert's width acts as a separate
    expert whose output is a summand, so expert tensor parallelism only multiplies the routes of a token.
    """

    def __init__(self, run: RunConfig, sharing: Sharing) -> None:
        """This rank's part of the experts of a run; weights are left as they come."""
        super().__init__()
        self.sharing = sharing
        self.num_local = num_local = run.model.num_experts * sharing.parts // sharing.ranks
        hidden_size, width = run.model.hidden_size, expert_width(run) // sharing.parts
        # An engine moves the model to its device once it is initialised.
        made: dict[str, Any] = {"dtype": parameter_dtype(run), "device": torch.get_default_device()}
        self.linear_fc1_LGD = nn.Parameter(torch.empty(num_local, 2 * width, hidden_size, **made))
        self.linear_fc2_LDF = nn.Parameter(torch.empty(num_local, hidden_size, width, **made))

    def forward(self, x_RD: Tensor, rows_L: Tensor, weights_R: Tensor) -> tuple[Tensor, None]:
        """Rows that a host has put in the order of the experts, as megatron-core calls its experts."""
        ends_L = rows_L.to(x_RD.device).cumsum(0, dtype=torch.int32)
        return experts(x_RD, *self._matrices(), ends_L, weights_R), None

    def weighted(
        self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, kept_TK: Tensor | None
    ) -> Tensor:
        """The layer's output ``_TD``; ``kept_TK``: the routes that no capacity drops, None for all.

        Collective where experts live on other ranks.
        """
        if kept_TK is not None:
            weights_TK = weights_TK * kept_TK
        y_RD, rows = self._through(x_TD, experts_TK, weights_TK, kept_TK)
        return collect(y_RD, rows.order_R, rows.row_R, experts_TK.size(1) * self.sharing.parts)

    def outputs_TKD(self, x_TD: Tensor, experts_TK: Tensor) -> Tensor:
        """The unweighted outputs of the chosen experts, with gradients; collective like :meth:`weighted`."""
        y_RD, rows = self._through(x_TD, experts_TK, None, None)
        return collect(y_RD, rows.order_R, rows.row_R, self.sharing.parts).view(*experts_TK.shape, -1)

    @property
    def local_experts(self) -> list[Callable[[Tensor], tuple[Tensor, None]]]:
        """Each expert as a function of ``[..., D]``; of a shared one the output is this rank's summand."""
        return [partial(self._one, number) for number in range(self.num_local)]

    def _one(self, number: int, x: Tensor) -> tuple[Tensor, None]:
        fc1_LGD, fc2_LDF = self._matrices()
        gate, up = F.linear(x, fc1_LGD[number]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, fc2_LDF[number]), None

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """Both parameters."""
        return self.linear_fc1_LGD, self.linear_fc2_LDF

    def _through(
        self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor | None, kept_TK: Tensor | None
    ) -> tuple[Tensor, RoutesByExpert]:
        """A row for each route, in the order of the plan that is returned."""
        parts, topk = self.sharing.parts, experts_TK.size(1)
        homes_TKP = self._homes(experts_TK)
        # with one rank, a weight of 0 drops the route, and no count is needed
        cut = kept_TK is not None and self.sharing.ranks > 1
        if cut:
            homes_TKP = torch.where(kept_TK.unsqueeze(-1), homes_TKP, self.sharing.ranks * self.num_local)  # type: ignore[union-attr]
        rows = sort_by_expert(homes_TKP.flatten(), self.sharing.ranks * self.num_local)
        x_RD = spread(x_TD, rows.order_R, rows.row_R, topk * parts)
        weights_R1 = None
        if weights_TK is not None:
            weights_R1 = spread(weights_TK.reshape(-1, 1), rows.order_R, rows.row_R, parts)
        if self.sharing.group is None:
            return self._experts(x_RD, weights_R1, rows.ends_E), rows
        return self._on_other_ranks(x_RD, weights_R1, rows.ends_E, self.sharing.group), rows

    def _homes(self, experts_TK: Tensor) -> Tensor:
        """``rank * L + place`` of every slice of every chosen expert: ``_TKP``."""
        parts = self.sharing.parts
        if parts == 1:
            return experts_TK.unsqueeze(-1)  # experts are numbered by rank
        rank_TK1 = (experts_TK // self.num_local * parts).unsqueeze(-1)
        rank_TKP = rank_TK1 + torch.arange(parts, device=experts_TK.device)
        return rank_TKP * self.num_local + (experts_TK % self.num_local).unsqueeze(-1)

    def _experts(self, x_RD: Tensor, weights_R1: Tensor | None, ends_L: Tensor) -> Tensor:
        weights_R = None if weights_R1 is None else weights_R1.squeeze(1)
        return experts(x_RD, *self._matrices(), ends_L, weights_R)

    def _on_other_ranks(
        self, x_RD: Tensor, weights_R1: Tensor | None, ends_V: Tensor, group: dist.ProcessGroup
    ) -> Tensor:
        """Send rows to their experts and get the results; rows after those of the last expert stay here, and
        are 0.
        """
        counts_NL = ends_V.diff(prepend=ends_V.new_zeros(1)).view(-1, self.num_local)
        coming_NL = torch.empty_like(counts_NL)
        dist.all_to_all_single(coming_NL, counts_NL, group=group)
        go, come = row_counts(counts_NL, coming_NL)
        gone = sum(go)
        sent = [part[:gone] for part in (x_RD, weights_R1) if part is not None]
        arrived = [exchanged(part, come, go, group) for part in sent]
        places_L = torch.arange(self.num_local, device=x_RD.device)
        places_R = places_L.repeat(len(come)).repeat_interleave(coming_NL.flatten(), output_size=sum(come))
        rows = sort_by_expert(places_R, self.num_local)
        x, *weights = (spread(part, rows.order_R, rows.row_R, 1) for part in arrived)
        y_RD = self._experts(x, weights[0] if weights else None, rows.ends_E)
        back_RD = exchanged(collect(y_RD, rows.order_R, rows.row_R, 1), go, come, group)
        return F.pad(back_RD, (0, 0, 0, len(x_RD) - gone)) if gone < len(x_RD) else back_RD


def row_counts(counts_NL: Tensor, coming_NL: Tensor) -> tuple[list[int], list[int]]:
    """How many rows go to each rank and come from it. The host waits for the GPU here, and nowhere else in a
    layer.
    """
    go, come = torch.stack((counts_NL, coming_NL)).sum(2).tolist()
    return go, come


def exchanged(rows: Tensor, come: list[int], go: list[int], group: dist.ProcessGroup) -> Tensor:
    """``go[i]`` rows to rank i, ``come[i]`` rows from it (collective); gradients go the opposite way."""
    received: Tensor = _Exchange.apply(rows, come, go, group)  # type: ignore[no-untyped-call]
    return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: object, rows: Tensor, come: list[int], go: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.way = (come, go, group)  # type: ignore[attr-defined]
        return _all_to_all(rows, come, go, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        come, go, group = ctx.way  # type: ignore[attr-defined]
        return _all_to_all(grad, go, come, group), None, None, None


def _all_to_all(rows: Tensor, come: list[int], go: list[int], group: dist.ProcessGroup) -> Tensor:
    received = rows.new_empty(sum(come), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), come, go, group=group)
    return received
