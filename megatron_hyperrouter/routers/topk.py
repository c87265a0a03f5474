"""SMoE's trained linear router; with ``pre_softmax`` that of Switch Transformers.

Legend: ``T`` tokens, ``D`` hidden size, ``E`` experts, ``K`` active experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from megatron_hyperrouter.ops.topk import softmax_topk
from megatron_hyperrouter.routers.base import Router, no_gradient_at_k1


class TopKRouter(Router, name="topk"):
    """``logits = W x + b`` with trained W (Shazeer et al. 2017, arXiv 1701.06538, without noise)."""

    config: Config

    @dataclass(frozen=True, kw_only=True)
    class Config(Router.Config):
        """A plain router: bias off, weights from the softmax over the kept logits."""

        init_std: Annotated[float, Ge(0.0), "standard deviation of the router's initial weights"] = 0.02
        bias: Annotated[bool, "add a trained bias to the logits"] = False
        pre_softmax: Annotated[bool, "Switch: weights are probabilities over all experts, not renormalised over the chosen"] = False

        def warnings(self, *, topk: int) -> Iterator[str]:
            """With ``pre_softmax`` the router learns at k = 1 as well."""
            return iter(()) if self.pre_softmax else no_gradient_at_k1("topk", topk)

    def __init__(self, config: Config, **common: Any) -> None:
        """``common``: the keywords of :class:`Router`."""
        super().__init__(config, **common)
        self.weight_ED = nn.Parameter(torch.empty(self.num_experts, self.hidden_size))
        self.bias_E = nn.Parameter(torch.empty(self.num_experts)) if config.bias else None
        self.reset()

    def reset_parameters(self, draw: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """W ~ N(0, init_std^2), b = 0."""
        with torch.no_grad():
            self.weight_ED.copy_(draw("weight_ED", tuple(self.weight_ED.shape)) * self.config.init_std)
            if self.bias_E is not None:
                self.bias_E.zero_()

    def logits(self, x_TD: Tensor) -> Tensor:
        """``W x + b``."""
        return F.linear(x_TD.float(), *self.linear())

    def choose(self, logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Switch takes the softmax first."""
        return softmax_topk(logits_TE, k) if self.config.pre_softmax else super().choose(logits_TE, k)

    def linear(self) -> tuple[Tensor, Tensor | None]:
        """The trained weights themselves."""
        return self.weight_ED.float(), None if self.bias_E is None else self.bias_E.float()

    def fold(self) -> Router:
        """A copy: there is nothing to fold."""
        return deepcopy(self)
