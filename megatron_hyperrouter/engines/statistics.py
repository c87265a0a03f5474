"""What routers chose in a step, summed over micro-batches and then over ranks.

Legend: ``L`` MoE layers, ``E`` experts, ``K`` active experts, ``X`` numbers that a method counts for itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hyperrouter.ops.balance import entropy, load, switch_loss, z_loss
from megatron_hyperrouter.routers.base import Router, Routing, StepCounts


class RouterStatistics:
    """Sums over one step of what the routers chose, one row a layer, ready for a single all-reduce.

    A row holds the load of each expert, the sums over tokens and over micro-batches that ``_TAIL`` names, and
    the method's own counts.
    """

    _TAIL = ("entropy_sum", "tokens", "aux_sum", "z_sum", "micro_batches")

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self.enabled = True
        self.make_room(0)

    def make_room(self, num_extra: int) -> None:
        """Start with ``num_extra`` more numbers a layer, for what the method counts."""
        numbers = self.num_experts + len(self._TAIL) + num_extra
        # They move to where the routers compute with the first micro-batch.
        self.sums: Tensor = torch.zeros(self.num_layers, numbers, dtype=torch.float64, device="cpu")

    @torch.no_grad()
    def record(self, router: Router, routing: Routing) -> None:
        """Add one micro-batch; the second forward pass of activation checkpointing is left out.

        Ranks that share the micro-batch (``router.over_shards``) each add their part of the means.
        """
        if not self.enabled or recomputing():
            return
        logits_TE, experts_TK = routing.logits_TE.detach(), routing.experts_TK
        if self.sums.device != logits_TE.device:
            self.sums = self.sums.to(logits_TE.device)
        load_E = load(experts_TK, self.num_experts)
        whole_E = load_E if router.over_shards is None else router.over_shards(load_E)
        part = load_E.sum(dtype=torch.float64) / whole_E.sum()  # of the micro-batch's tokens
        tokens = logits_TE.size(0)
        tail = (
            entropy(logits_TE) * tokens,
            part.new_full(
                (), tokens
            ),  # filled where it is: a number copied to a GPU would make the host wait
            switch_loss(logits_TE.softmax(-1), experts_TK, lambda _: whole_E),
            z_loss(logits_TE) * part,
            part,
        )
        row = self.sums[router.layer_number - 1]
        row[: self.num_experts] += load_E
        row[self.num_experts : self.num_experts + len(tail)] += torch.stack(
            [value.double() for value in tail]
        )
        if router.num_extra_counts:
            row[self.num_experts + len(tail) :] += router.extra_counts(routing)

    def take(self) -> Tensor:
        """The sums so far; starts afresh."""
        sums, self.sums = self.sums, torch.zeros_like(self.sums)
        return sums

    def summary(self, sums: Tensor) -> dict[str, list[float]]:
        """Per MoE layer, from sums over all ranks: entropy (nats), load_max_over_mean, aux and z (before
        coefficients).
        """
        sums = sums[self.routed(sums)]
        load_LE, tail = sums[:, : self.num_experts], self._tail(sums)
        return {
            "entropy": (tail["entropy_sum"] / tail["tokens"]).tolist(),
            "load_max_over_mean": (load_LE.amax(1) / load_LE.mean(1)).tolist(),
            "aux": (tail["aux_sum"] / tail["micro_batches"]).tolist(),
            "z": (tail["z_sum"] / tail["micro_batches"]).tolist(),
        }

    def counts(self, sums: Tensor, layer_number: int, *, step: int, tokens: int, replicas: int) -> StepCounts:
        """One layer's, from sums over all ranks; ``tokens``: of the global batch, each of which ``replicas``
        ranks have counted.
        """
        row = sums[layer_number - 1] / replicas
        return StepCounts(
            step, float(tokens), row[: self.num_experts], row[self.num_experts + len(self._TAIL) :]
        )

    def routed(self, sums: Tensor) -> Tensor:
        """Indices of the layers that have routed tokens, from sums over all ranks: dense layers have not."""
        return self.tokens_L(sums).nonzero().flatten()

    def tokens_L(self, sums: Tensor) -> Tensor:
        """How many tokens each layer has seen, from sums over all ranks; replicas count each time."""
        return self._tail(sums)["tokens"]

    def _tail(self, sums: Tensor) -> dict[str, Tensor]:
        """Name -> ``_L``."""
        return dict(
            zip(
                self._TAIL,
                sums[:, self.num_experts : self.num_experts + len(self._TAIL)].unbind(1),
                strict=True,
            )
        )


def recomputing() -> bool:
    """True inside ``backward()``: a forward pass there is activation checkpointing's second."""
    return torch._C._current_graph_task_id() != -1
