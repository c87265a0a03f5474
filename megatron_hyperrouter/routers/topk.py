"""SMoE's trained linear router (arXiv 1701.06538).  Its options also give the routers of Switch Transformers
(arXiv 2101.03961) and DeepSeek-V3 (arXiv 2412.19437, 2408.15664).

Legend: ``T`` tokens, ``D`` hidden size, ``E`` experts.

Logits ``g = W x + b``, with b where ``bias`` is on.  ``freeze``: W and b stay as drawn; checkpoints contain
them.  ``choice.py`` says how experts are chosen by g.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn

from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.errors import Problem
from megatron_hyperrouter.ops.linear import float32_linear
from megatron_hyperrouter.routers.base import Router
from megatron_hyperrouter.routers.choice import ChoosingRouter, no_gradient_at_k1


class TopKRouter(ChoosingRouter, name="topk"):
    """A trained linear router; options turn it into the router of Switch or DeepSeek-V3."""

    config: Config

    @dataclass(frozen=True, kw_only=True)
    class Config(ChoosingRouter.Config):
        """A plain router: bias off, weights from the softmax over the kept logits."""

        init_std: Annotated[
            float, Ge(0.0), Role.INITIAL, "Standard deviation of the router's initial weights"
        ] = 0.02
        bias: Annotated[bool, "Add a trained bias to the logits"] = False
        freeze: Annotated[bool, "Keep the router's weights at their initial values"] = False

        def problems(self, *, hidden_size: int, num_experts: int) -> Iterator[Problem]:
            """A frozen router must not change its routes."""
            yield from super().problems(hidden_size=hidden_size, num_experts=num_experts)
            if self.freeze and self.expert_bias and self.update_rate:
                rule = "freezes the router, but --router.expert-bias changes its choices at each step"
                yield Problem(
                    "--router.freeze",
                    True,
                    rule,
                    ("add --router.bias-update-rate 0, or keep one of the two options"),
                )

        def warnings(self, *, topk: int) -> Iterator[str]:
            """A trained router whose weights sum to 1 gets no gradient from the language-model loss at k =
            1, and a frozen router has no learning rate.
            """
            if self.freeze and self.lr_mult != 1.0:
                yield "--router.lr-mult has no effect, because --router.freeze keeps the initial weights"
            if self.sums_to_one and not self.freeze:
                yield from no_gradient_at_k1("topk", topk)

    def __init__(self, config: Config, **common: Any) -> None:
        """``common``: the keywords of :class:`Router`."""
        super().__init__(config, **common)
        self.weight_ED = nn.Parameter(
            torch.empty(self.num_experts, self.hidden_size), requires_grad=not config.freeze
        )
        self.bias_E = (
            nn.Parameter(torch.empty(self.num_experts), requires_grad=not config.freeze)
            if config.bias
            else None
        )
        self.reset()

    def reset_parameters(self, draw: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """W ~ N(0, init_std^2), or with the scale that gives ``logit_std``; b = 0."""
        with torch.no_grad():
            self.weight_ED.copy_(draw("weight_ED", tuple(self.weight_ED.shape)) * self.matrix_std())
            if self.bias_E is not None:
                self.bias_E.zero_()

    def logits(self, x_TD: Tensor) -> Tensor:
        """``W x + b``."""
        return float32_linear(x_TD, *self.linear())

    def linear(self) -> tuple[Tensor, Tensor | None]:
        """The weights themselves; ``expert_bias`` is not part of the map, because it does not change the
        logits.
        """
        return self.weight_ED.float(), None if self.bias_E is None else self.bias_E.float()

    def fold(self) -> Router:
        """A copy with all options: this router is already a plain matrix."""
        return deepcopy(self)
