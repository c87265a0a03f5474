"""StableMoE: learn to route, distil the routes into a small router on word embeddings, then freeze that
router (arXiv 2204.08396).

``s = E x`` with trained centroids E; ``D(w)`` is a separate table of word embeddings, and ``s' = E' D(w)``
are the scores of the distilled router.

Stage 1, the first ``stage1_steps`` optimizer steps: ids = top-k of s; the weights are
``sigmoid(s_chosen)``, not normalised.  Losses:

    balance       alpha / T * sum_i (n_i - n) / n * sum_(routes to i) sigmoid(s_ti)
                  with n_i the routes to i, and n = T K / E
    distillation  mean over tokens and their chosen ids a of -log softmax(s')_a; trains D and E' only

Stage 2, and evaluation if there is a frozen copy: ids = top-k of s' with D and E' as they were at the
switch. The weights are still ``sigmoid(s_chosen)``, and the centroids still learn.  There are no router
losses, including ``aux`` and ``z``.  Evaluation before the switch routes by the centroids.

The switch copies D and E' into buffers, in the first pass after ``stage1_steps`` completed steps.  Later
passes, repeated passes and resumed runs use this copy.  The optimizer still has the trained D and E'.
Their gradients are zero in stage 2 (hosts need a gradient for every parameter); momentum and decay may
still change them, without effect.  A training pass of stage 1 deletes the copy: a run that goes back to an
earlier step, or continues with a longer first stage, distils again.

Differences from the paper: its balance loss is a sum over the tokens of a batch, ours the mean in each
micro-batch, like the language-model loss.  k may exceed 1; the distillation is then averaged over the
chosen ids, and weights do not sum to 1.  Every MoE layer has its own D; the paper has one such layer.  The
optimizer keeps its state of D and E' for the whole run.  Initial values are our choice.  The routers
called stablemoe in the CompeteSMoE and SimSMoE repositories have neither the sigmoid, nor distillation,
nor a second stage.

Legend: ``T`` tokens, ``D`` hidden size, ``E`` experts, ``K`` active experts, ``V`` token ids, ``W``
features of a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from megatron_hyperrouter.config.kinds import Count, Natural
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.errors import Problem
from megatron_hyperrouter.ops.balance import overload_loss, token_mean
from megatron_hyperrouter.ops.linear import reaching
from megatron_hyperrouter.routers.base import Pass, Router, Routing, uncompiled
from megatron_hyperrouter.routers.choice import without_tokens


class StableMoERouter(Router, name="stablemoe"):
    """Trained centroids in stage 1; after it, a frozen function of the token id chooses the experts
    (StableMoE).
    """

    config: Config
    frozen_word_VW: Tensor
    frozen_centroid_EW: Tensor
    frozen_at: Tensor  # int64 [1]: completed steps at the switch, -1 before

    @dataclass(frozen=True, kw_only=True)
    class Config(Router.Config):
        """The published values; the paper's k is 1."""

        stage1_share: Annotated[
            float,
            Gt(0.0),
            Le(1.0),
            (
                "Length of stage 1, as a fraction of --train-iters. The routing is frozen after stage "
                "1; 1: never freeze the routing"
            ),
        ] = 0.1
        stage1_steps: Annotated[
            Natural | None,
            "Number of steps in stage 1; 0 (for fine-tuning): start in stage 2 with the distilled "
            "router in the checkpoint; default: computed from --router.stage1-share",
        ] = None
        word_size: Annotated[
            Count,
            ("Size of a token's embedding in the distilled router, which chooses the experts after stage 1"),
        ] = 50
        balance_coeff: Annotated[float, Ge(0.0), "Weight of the load-balancing loss in stage 1"] = 0.3
        distillation_coeff: Annotated[float, Ge(0.0), "Weight of the distillation loss in stage 1"] = 1.0
        init_std: Annotated[
            float, Ge(0.0), Role.INITIAL, "Standard deviation of the initial expert centroids"
        ] = 0.02

        def problems(self, *, hidden_size: int, num_experts: int) -> Iterator[Problem]:
            """Only one option may set the length of stage 1."""
            yield from super().problems(hidden_size=hidden_size, num_experts=num_experts)
            if self.stage1_steps is not None and self.stage1_share != type(self).stage1_share:
                rule = f"has no effect with --router.stage1-steps {self.stage1_steps}"
                yield Problem("--router.stage1-share", self.stage1_share, rule, "keep one of the two options")

        def warnings(self, *, topk: int) -> Iterator[str]:
            """A warning if stage 2 would use a router that was never distilled."""
            if self.distillation_coeff == 0.0 and (self.stage1_steps is not None or self.stage1_share < 1.0):
                yield ("with --router.distillation-coeff 0, stage 2 routes each token id to random experts")

        def stage(self, step: int, train_iters: int) -> int:
            """1 while the routes are learned, 2 when they are frozen."""
            first = self.stage1_steps
            if first is None:
                if self.stage1_share == 1.0:
                    return 1
                first = max(1, round(self.stage1_share * train_iters))
            return 2 if step >= first else 1

        def unserved(self) -> Iterator[str]:
            """Routing by token ids."""
            yield without_tokens("router stablemoe", "nothing is distilled, and stage 2 raises ValueError")

    def __init__(self, config: Config, **common: Any) -> None:
        """``common``: the keywords of :class:`Router`; ``facts`` has the size of the vocabulary and the steps
        of the run.
        """
        super().__init__(config, **common)
        words, experts, size = self.facts.vocab_size, self.num_experts, config.word_size
        self.centroid_ED = nn.Parameter(torch.empty(experts, self.hidden_size))
        self.word_VW = nn.Parameter(torch.empty(words, size))
        self.word_centroid_EW = nn.Parameter(torch.empty(experts, size))
        self.register_buffer("frozen_word_VW", torch.empty(words, size, dtype=torch.float32))
        self.register_buffer("frozen_centroid_EW", torch.empty(experts, size, dtype=torch.float32))
        self.register_buffer("frozen_at", torch.empty(1, dtype=torch.int64))
        self.reset()

    def reset_parameters(self, draw: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """Centroids ~ N(0, init_std^2); D ~ N(0, 1) and E' ~ N(0, 1/W), so that s' starts with unit standard
        deviation.
        """
        stds = {
            "centroid_ED": self.config.init_std,
            "word_VW": 1.0,
            "word_centroid_EW": self.config.word_size**-0.5,
        }
        with torch.no_grad():
            for name, std in stds.items():
                parameter = self.get_parameter(name)
                parameter.copy_(draw(name, tuple(parameter.shape)) * std)

    def reset_buffers(self) -> None:
        """See :meth:`Router.reset_buffers`; there is no frozen copy."""
        super().reset_buffers()
        self.frozen_word_VW.zero_()
        self.frozen_centroid_EW.zero_()
        self.frozen_at.fill_(-1)

    def is_frozen(self, step: int) -> bool:
        """Whether training after ``step`` completed steps is in the second stage; the same on every rank."""
        return self.config.stage(step, self.facts.train_iters) == 2

    def _by_words(self, now: Pass) -> bool:
        """Whether the second stage's router decides.  In evaluation, the frozen copy shows this as well,
        because a reader of a checkpoint may not know the step.
        """
        return self.is_frozen(now.step) or (not now.training and int(self.frozen_at) >= 0)

    def logits(self, x_TD: Tensor) -> Tensor:
        """``s = E x``, in both stages."""
        return F.linear(x_TD.float(), self.centroid_ED.float())

    def choose(self, logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The first stage's decision."""
        experts_TK = self.best(logits_TE, k)
        return logits_TE.gather(-1, experts_TK).sigmoid(), experts_TK

    def balance_losses(self, logits_TE: Tensor, experts_TK: Tensor, now: Pass) -> dict[str, Tensor]:
        """The first stage's losses; distillation where the token ids are known."""
        if self._by_words(now):
            return {}
        losses, config = super().balance_losses(logits_TE, experts_TK, now), self.config
        if config.balance_coeff:
            values_TK = logits_TE.gather(-1, experts_TK).sigmoid()
            losses["balance"] = config.balance_coeff * overload_loss(
                values_TK, experts_TK, self.num_experts, self.over_shards
            )
        if config.distillation_coeff and now.training and now.tokens is not None:
            distilled_TE = F.linear(
                F.embedding(now.tokens.ids_T, self.word_VW).float(), self.word_centroid_EW.float()
            )
            wrong_T = -distilled_TE.log_softmax(-1).gather(-1, experts_TK).mean(-1)
            losses["distillation"] = config.distillation_coeff * token_mean(wrong_T, self.over_shards)
        return losses

    def refine(self, first: Routing, x_TD: Tensor, now: Pass) -> Routing:
        """The second stage's decision; raises ValueError if it does not know the token ids."""
        if self._by_words(now):
            experts_TK = self._frozen_experts(now)
            weights_TK = self.scaled(first.logits_TE.gather(-1, experts_TK).sigmoid())
            first = first._replace(weights_TK=weights_TK, experts_TK=experts_TK)
        elif now.training:
            self.frozen_at.fill_(-1)
        if now.training and "distillation" not in first.losses:
            weights_TK = reaching(first.weights_TK, self.word_VW, self.word_centroid_EW)
            first = first._replace(weights_TK=weights_TK)
        return first

    def _frozen_experts(self, now: Pass) -> Tensor:
        if now.tokens is None:
            raise ValueError(
                f"router stablemoe at step {now.step} is in stage 2 and routes by token "
                "ids; call it with tokens=Tokens(...), or build it with "
                "stage1_share=1.0 to stay in stage 1"
            )
        with torch.no_grad():
            self._freeze(now.step)
            return self.best(
                F.linear(F.embedding(now.tokens.ids_T, self.frozen_word_VW), self.frozen_centroid_EW), now.k
            )

    @uncompiled  # type: ignore[untyped-decorator]
    def _freeze(self, step: int) -> None:
        """Copy D and E', unless they have been copied already."""
        if self.frozen_at.device.type == "cpu" and int(self.frozen_at) >= 0:
            return
        done = self.frozen_at >= 0  # decided on the device: the host of a GPU need not wait for the number
        for kept, live in (
            (self.frozen_word_VW, self.word_VW),
            (self.frozen_centroid_EW, self.word_centroid_EW),
        ):
            kept.copy_(torch.where(done, kept, live.float()))
        self.frozen_at.copy_(torch.where(done, self.frozen_at, step))

    def linear(self) -> tuple[Tensor, Tensor | None]:
        """Refused."""
        raise NotImplementedError(
            "router stablemoe cannot be folded into a matrix, because its routing weights are sigmoids and "
            "stage 2 routes by token ids"
        )
