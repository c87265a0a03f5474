"""SMoE-Dropout: a random linear router that is never trained, and a k that grows (Chen et al. 2023, arXiv
2303.01610).

Legend: ``T`` tokens, ``D`` hidden size, ``E`` experts.

``g = W x`` with ``W ~ N(0, init_std^2)``, drawn once for each layer; the k largest logits are chosen, ``w =
softmax(g_S)``. k follows ``--topk-schedule`` from ``--topk-start`` to ``--moe-router-topk``: the published
runs grow linearly from 8 to 16. Published code keeps W in the checkpoint, with a bias of zeros; here the
checkpoint contains its seed and hash, and W is drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from megatron_hyperrouter.config.kinds import Natural
from megatron_hyperrouter.errors import Problem
from megatron_hyperrouter.ops import keyed
from megatron_hyperrouter.ops.linear import float32_linear
from megatron_hyperrouter.routers.choice import ChoosingRouter
from megatron_hyperrouter.routers.frozen import FrozenRouter, Recipe


@dataclass(frozen=True)
class LinearRecipe(Recipe):
    """A fixed W ~ N(0, std^2)."""

    num_experts: int
    hidden_size: int
    std: float

    def draw(self, device: torch.device) -> tuple[tuple[Tensor, ...], str]:
        """``(W_ED,)``."""
        tensors = (self.normal("weight", (self.num_experts, self.hidden_size), self.std, device),)
        return tensors, keyed.digest(tensors)


class SMoEDropoutRouter(ChoosingRouter, FrozenRouter, name="smoe_dropout"):
    """``logits = W x`` with a frozen random W: no trainable parameters (SMoE-Dropout).

    Routing still changes during training, because x does.
    """

    config: Config

    @dataclass(frozen=True, kw_only=True)
    class Config(ChoosingRouter.Config):
        """The published router; ``logit_std`` matches another router's logits."""

        init_std: Annotated[float, Ge(0.0), "Standard deviation of the frozen weights"] = 0.02
        seed: Annotated[Natural | None, "Random seed of the frozen weights; default: --seed"] = None

        def problems(self, *, hidden_size: int, num_experts: int) -> Iterator[Problem]:
            """A learning rate has no effect, because nothing is trained."""
            yield from super().problems(hidden_size=hidden_size, num_experts=num_experts)
            if self.lr_mult != 1.0:
                rule = "has no effect: router smoe_dropout has no trainable parameters"
                yield Problem("--router.lr-mult", self.lr_mult, rule, "leave it out")

    def __init__(self, config: Config, **common: Any) -> None:
        """``common``: the keywords of :class:`Router`."""
        super().__init__(config, **common)
        seed = self.seed if config.seed is None else config.seed
        self.freeze(
            LinearRecipe(
                seed,
                f"smoe_dropout.layer{self.layer_number}",
                self.num_experts,
                self.hidden_size,
                self.matrix_std(),
            )
        )
        self.reset()

    def reset_parameters(self, draw: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """Nothing is trained."""

    def logits(self, x_TD: Tensor) -> Tensor:
        """``W x``."""
        return float32_linear(x_TD, *self.frozen_tensors(x_TD.device))

    def linear(self) -> tuple[Tensor, Tensor | None]:
        """A copy of the frozen weights."""
        return self.frozen.tensors[0].clone(), None
