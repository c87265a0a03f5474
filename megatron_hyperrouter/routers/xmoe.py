"""X-MoE: cosine routing on a low-dimensional hypersphere (Chi et al. 2022, arXiv 2204.09179).

Legend: ``T`` tokens, ``D`` hidden size, ``E`` experts, ``K`` active experts, ``P`` size of the projection.

With the projection A (``[P, D]``) and the expert embeddings e_i (P numbers each), all trained:

- ``u = A x / |A x|`` (``normalize_input``, the paper's equation 6), ``s_i = u . e_i / |e_i|``, in [-1, 1];
- logits ``g_i = s_i / tau`` with one trained tau a layer, ``tau = init_temperature * exp(t)``, t trained:
  tau stays positive;
- gate ``p = softmax(g)`` over all E, or ``sigmoid(g)``; the k largest are chosen, ``w_i = p_i``: at k = 1
  the router learns from the task.  ``renormalise`` divides by their sum over the chosen, as many do for k > 1
  (the paper has k = 1);
- auxiliary loss ``coefficient * E sum_i f_i mean softmax(s / tau0)_i`` for both gates, tau0 fixed: 0.3 with
  softmax, 0.07 with sigmoid.

Published code (the repositories of CompeteSMoE v1 and SimSMoE) leaves the input as it is: ``s_i = A x . e_i /
|e_i|`` (``normalize_input`` off).  That is a linear map and no cosine: the length of A x sharpens the gate,
and the router folds. Their code also has 8 for P, no temperature in the gate, and rescales e_i in place,
which the normalisation undoes.  Ours differs from both in its initial values: rows of A ~ N(0, 1/D), e_i ~
N(0, 1/P), tau = tau0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor, nn

from megatron_hyperrouter.config.kinds import Count
from megatron_hyperrouter.ops.balance import switch_loss, z_loss
from megatron_hyperrouter.ops.topk import scored_topk
from megatron_hyperrouter.routers.base import Pass, Router
from megatron_hyperrouter.routers.choice import no_gradient_at_k1

# smallest length to divide by: a token of zeros, such as padding, has cosine 0 and a finite gradient
_EPS = 1e-6
_BALANCE_TEMPERATURE = {"softmax": 0.3, "sigmoid": 0.07}  # tau0, the paper's section 4.1


class XMoERouter(Router, name="xmoe"):
    """``logits = cos(A x, e) / tau`` with trained A, e and tau (X-MoE, arXiv 2204.09179)."""

    config: Config

    @dataclass(frozen=True, kw_only=True)
    class Config(Router.Config):
        """The paper's router; without ``normalize_input``, the router of the published code, which can be
        folded into a linear gate.
        """

        projection_size: Annotated[
            Count | None,
            "Number of dimensions to which tokens are projected; default: half the number of experts",
        ] = None
        score_function: Annotated[
            Literal["softmax", "sigmoid"],
            "Function that turns logits into scores; the experts with the highest scores are chosen",
        ] = "softmax"
        renormalise: Annotated[bool, "Divide the routing weights by their sum over the chosen experts"] = (
            False
        )
        normalize_input: Annotated[
            bool,
            "Normalize projected tokens to unit length, as in the paper; off: no normalization, as "
            "in the published code",
        ] = True
        init_temperature: Annotated[
            float | None, Gt(0.0), "Initial temperature tau; default: 0.3 with softmax, 0.07 with sigmoid"
        ] = None

        def warnings(self, *, topk: int) -> Iterator[str]:
            """Weights that sum to 1 give the router no gradient at k = 1."""
            return no_gradient_at_k1("xmoe", topk) if self.renormalise else iter(())

        @property
        def balance_temperature(self) -> float:
            """The fixed tau0 of the auxiliary loss."""
            return _BALANCE_TEMPERATURE[self.score_function]

    def __init__(self, config: Config, **common: Any) -> None:
        """``common``: the keywords of :class:`Router`."""
        super().__init__(config, **common)
        size = config.projection_size or max(self.num_experts // 2, 1)
        self.first_temperature = config.init_temperature or config.balance_temperature
        self.projection_PD = nn.Parameter(torch.empty(size, self.hidden_size))
        self.embedding_EP = nn.Parameter(torch.empty(self.num_experts, size))
        # relative to its initial value: near 0, bfloat16 is precise enough
        self.log_temperature = nn.Parameter(torch.empty(1))
        self.reset()

    def reset_parameters(self, draw: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """A ~ N(0, 1/D): A x has the variance of x; e ~ N(0, 1/P): lengths near 1; tau =
        ``init_temperature``.
        """
        with torch.no_grad():
            self.projection_PD.copy_(
                draw("projection_PD", tuple(self.projection_PD.shape)) * self.hidden_size**-0.5
            )
            self.embedding_EP.copy_(
                draw("embedding_EP", tuple(self.embedding_EP.shape)) * self.embedding_EP.size(1) ** -0.5
            )
            self.log_temperature.zero_()

    def temperature(self) -> Tensor:
        """tau, float32 ``[1]``."""
        return self.first_temperature * self.log_temperature.float().exp()

    def logits(self, x_TD: Tensor) -> Tensor:
        """Cosines (or, without ``normalize_input``, products with unit vectors), divided by tau."""
        if not self.config.normalize_input:
            return F.linear(x_TD.float(), *self.linear())
        point_TP = on_sphere(F.linear(x_TD.float(), self.projection_PD.float()))
        return F.linear(point_TP, on_sphere(self.embedding_EP.float())) / self.temperature()

    def choose(self, logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The gate comes before the choice."""
        return scored_topk(
            logits_TE,
            k,
            score=self.config.score_function,
            renormalise=self.config.renormalise,
            groups=self.config.groups,
        )

    def balance_losses(self, logits_TE: Tensor, experts_TK: Tensor, now: Pass) -> dict[str, Tensor]:
        """``aux`` over softmax(s / tau0), whose gradient with respect to tau is zero up to rounding; ``z``
        of the logits.
        """
        losses: dict[str, Tensor] = {}
        if self.aux_loss_coeff:
            scale = self.temperature() / self.config.balance_temperature
            losses["aux"] = self.aux_loss_coeff * switch_loss(
                (logits_TE * scale).softmax(-1), experts_TK, self.over_shards
            )
        if self.z_loss_coeff:
            losses["z"] = self.z_loss_coeff * z_loss(logits_TE, self.over_shards)
        return losses

    def linear(self) -> tuple[Tensor, Tensor | None]:
        """W = (e / |e|) A / tau, without ``normalize_input``; raises where tokens are normalised."""
        if self.config.normalize_input:
            raise NotImplementedError(
                "router xmoe normalizes each token, so it is not a linear function of its input; "
                "train with --router.no-normalize-input to get a linear router"
            )
        return on_sphere(self.embedding_EP.float()) @ self.projection_PD.float() / self.temperature(), None

    def folded_options(self) -> dict[str, Any]:
        """The gate of the ``topk`` router; its auxiliary loss has the temperature of the gate, not tau0."""
        softmax = self.config.score_function == "softmax"
        return {
            "score_function": self.config.score_function,
            "pre_softmax": softmax,
            "renormalise": self.config.renormalise,
        }


def on_sphere(vector_NP: Tensor) -> Tensor:
    """Each row divided by its length, or by 1e-6 if its length is less."""
    return F.normalize(vector_NP, dim=-1, eps=_EPS)
