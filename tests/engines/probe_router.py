"""A router that asks an engine for everything that the protocol offers: what its layouts disagree on, the
engine gets wrong.

Legend: as in ``routers/base.py``; ``P`` features of its head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hyperrouter.ops.balance import token_mean
from megatron_hyperrouter.ops.linear import reaching
from megatron_hyperrouter.ops.topk import best_experts
from megatron_hyperrouter.routers.base import Pass, Router, Routing, StepCounts

P = 3


class ProbeRouter(Router, name="probe"):
    """Not a method that anybody should train with."""

    needs_experts = True
    history_EE: Tensor

    def __init__(self, config: Router.Config, **common: Any) -> None:
        super().__init__(config, **common)
        self.weight_ED = nn.Parameter(torch.empty(self.num_experts, self.hidden_size))
        self.head_PD = nn.Parameter(torch.empty(P, self.hidden_size))
        self.register_buffer(
            "history_EE", torch.zeros(self.num_experts, self.num_experts, dtype=torch.float64)
        )
        self.reset()

    def reset_parameters(self, draw: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        with torch.no_grad():
            self.weight_ED.copy_(draw("weight_ED", tuple(self.weight_ED.shape)) * 0.3)
            self.head_PD.copy_(draw("head_PD", tuple(self.head_PD.shape)) * 0.3)

    def view(self, x_TD: Tensor, now: Pass) -> Tensor:
        """Noise that depends on what a token is and where it stands."""
        assert now.tokens is not None
        assert now.tokens.ids_T.shape == x_TD.shape[:1]
        noise_T = torch.sin(now.tokens.ids_T * 1.7 + now.tokens.places_T * 12.9898 + now.step)
        return x_TD * (1 + 0.2 * noise_T.unsqueeze(1)) if now.training else x_TD

    def logits(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD.float(), self.weight_ED.float(), self.history_EE.diagonal().float())

    def refine(self, first: Routing, x_TD: Tensor, now: Pass) -> Routing:
        """Experts by their own scores in a competing step."""
        assert now.experts is not None
        scores_TE = now.experts.scores_TE(x_TD, lambda output: output.square().mean(-1))
        assert not scores_TE.requires_grad
        target_TE = (50 * scores_TE).softmax(-1)
        losses = {
            **first.losses,
            "distil": token_mean(
                (first.logits_TE.softmax(-1) - target_TE).square().mean(-1), self.over_shards
            ),
        }
        if not self.wants_outputs(now):
            return first._replace(losses=losses, weights_TK=reaching(first.weights_TK, self.head_PD))
        experts_TK = best_experts(target_TE, now.k)
        return Routing(first.logits_TE, target_TE.gather(1, experts_TK), experts_TK, losses)

    def wants_outputs(self, now: Pass) -> bool:
        return now.training and now.step % 2 == self.layer_number % 2

    def combine(self, routing: Routing, x_TD: Tensor, outputs_TKD: Tensor, now: Pass) -> Routing:
        """Weights from the outputs, and a loss that no sum over ranks could make."""
        score_TK = F.softplus(10 * outputs_TKD.float().mean(-1))
        features_TP = F.linear(outputs_TKD.float().mean(1), self.head_PD.float())
        if self.gather_shards is not None:
            features_TP = self.gather_shards(features_TP)
        spread = features_TP.var(0).log().mean()
        return routing._replace(
            weights_TK=score_TK / score_TK.sum(-1, keepdim=True),
            losses={**routing.losses, "spread": 0.01 * spread},
        )

    @property
    def num_extra_counts(self) -> int:
        return self.num_experts**2

    def extra_counts(self, routing: Routing) -> Tensor:
        chosen_TE = torch.zeros_like(routing.logits_TE, dtype=torch.float64).scatter_(
            1, routing.experts_TK, 1.0
        )
        return (chosen_TE.T @ chosen_TE).flatten()

    def end_step(self, counts: StepCounts) -> None:
        self.history_EE += counts.extra.view_as(self.history_EE).to(self.history_EE.device) / counts.tokens
        assert torch.equal(counts.extra.view_as(self.history_EE).diagonal(), counts.load_E)
