"""Choice, weights and balance for routers that decide by their logits.

Legend: ``T`` tokens, ``E`` experts, ``K`` active experts.

With logits ``g``, scores ``s`` (softmax of g over all E, or sigmoid) and the chosen set S:

- default (Shazeer et al. 2017, arXiv 1701.06538, without its noise): S = the k largest g, ``w =
  softmax(g_S)``;
- ``pre_softmax`` (Switch, arXiv 2101.03961, with k = 1): ``w_i = s_i``, which sum to less than 1.  With
  ``renormalise``, ``w_i = s_i / sum_S s``, which is equal to the default and is computed like it;
- ``score_function sigmoid`` (DeepSeek-V3, arXiv 2412.19437): ``w_i = s_i``; with ``renormalise``, divided
  by their sum;
- ``expert_bias`` (arXiv 2408.15664): S = the k largest ``s + c``; weights as above, without c.  After each
  optimizer step ``c_i += bias_update_rate * sign(mean load - load_i)``, with loads over the whole global
  batch;
- ``jitter_eps`` (Switch): in training, the router (not the experts) gets x times a uniform number in [1 -
  eps, 1 + eps].

Auxiliary loss: coefficient times ``E sum_i f_i P_i``.  P is the mean over tokens of s (sigmoid: divided by
its sum over E).  f_i is the share of routes to expert i in the micro-batch, in each sequence (averaged),
or in the last global batch. ``global_batch``: f is that of the previous step (uniform at first), and the
gradient flows through the P of this micro-batch. Megatron-core instead uses a running mean over the
micro-batches so far, which depends on the number of replicas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.errors import Problem
from megatron_hyperrouter.ops.balance import bias_step, known_load_loss, sequence_loss, switch_loss, z_loss
from megatron_hyperrouter.ops.jitter import jitter
from megatron_hyperrouter.ops.topk import log_scores, scored_topk
from megatron_hyperrouter.routers.base import Pass, Router, StepCounts

_UPDATE_RATE = 0.001  # arXiv 2408.15664, section 4.1


class ChoosingRouter(Router):
    """Base of the routers that decide by their logits; a method only computes the logits."""

    config: Config
    share_E: Tensor  # float32 shares of routes in the last global batch; only with aux_loss global_batch
    choice_bias_E: Tensor  # float32; only with expert_bias

    @dataclass(frozen=True, kw_only=True)
    class Config(Router.Config):
        """By default: weights from the softmax over the kept logits."""

        score_function: Annotated[
            Literal["softmax", "sigmoid"], "Function that turns logits into scores; DeepSeek-V3 uses sigmoid"
        ] = "softmax"
        pre_softmax: Annotated[
            bool,
            "Compute the routing weights with a softmax over all experts, not only over the chosen ones "
            "(Switch)",
        ] = False
        renormalise: Annotated[
            bool,
            "With --router.pre-softmax or sigmoid scores: divide the routing weights by their sum over the "
            "chosen experts",
        ] = False
        jitter_eps: Annotated[
            float,
            Ge(0.0),
            Lt(1.0),
            "In training, multiply the router's input by random factors between 1 - X and 1 + X (Switch)",
        ] = 0.0
        aux_loss: Annotated[
            Literal["micro_batch", "global_batch", "sequence", "off"],
            "Tokens for which the load-balancing loss counts the load of each expert. global_batch: "
            "the global batch of the previous step; off: no load-balancing loss",
        ] = "micro_batch"
        expert_bias: Annotated[
            bool,
            "Balance the load without a loss (DeepSeek-V3): choose experts by score + bias, with "
            "one bias for each expert. The biases do not affect the routing weights",
        ] = False
        bias_update_rate: Annotated[
            float | None,
            Ge(0.0),
            (
                "With --router.expert-bias: amount by which each step raises or lowers an expert's bias; "
                "0: the biases stay fixed; default: 0.001"
            ),
        ] = None
        logit_std: Annotated[
            float | None,
            Gt(0.0),
            Role.INITIAL,
            "Standard deviation of the initial logits, for inputs of unit variance; default: the "
            "value that follows from the router's initial weights",
        ] = None

        def problems(self, *, hidden_size: int, num_experts: int) -> Iterator[Problem]:
            """Options that contradict each other, or that have no effect because of another option."""
            yield from super().problems(hidden_size=hidden_size, num_experts=num_experts)
            if self.pre_softmax and self.score_function == "sigmoid":
                yield Problem(
                    "--router.pre-softmax",
                    True,
                    "cannot be combined with --router.score-function sigmoid",
                    "keep one of the two options",
                )
            if self.renormalise and self.renormalised_anyway:
                rule = "has no effect: the routing weights of the chosen experts already sum to 1"
                yield Problem("--router.renormalise", True, rule, "leave it out, or add --router.pre-softmax")
            if self.bias_update_rate is not None and not self.expert_bias:
                yield Problem(
                    "--router.bias-update-rate",
                    self.bias_update_rate,
                    "needs --router.expert-bias",
                    "add --router.expert-bias, or leave out --router.bias-update-rate",
                )
            own = getattr(self, "init_std", None)
            if self.logit_std is not None and own != getattr(type(self), "init_std", None):
                rule = "sets the scale of the logits, which --router.init-std also sets"
                yield Problem("--router.logit-std", self.logit_std, rule, "keep one of the two options")

        def initial_logit_std(self, hidden_size: int) -> float | None:
            """The value that is set, or the one that follows from the other options."""
            return super().initial_logit_std(hidden_size) if self.logit_std is None else self.logit_std

        def lost(self, *, num_layers: int, aux_loss_coeff: float) -> Iterator[str]:
            """Warns of a balance loss with the coefficient 0."""
            if self.aux_loss not in (type(self).aux_loss, "off") and not aux_loss_coeff:
                yield f"--router.aux-loss {self.aux_loss} has no effect, because --moe-aux-loss-coeff is 0"

        def unserved(self) -> Iterator[str]:
            """Options that need the global batch or the positions of tokens."""
            if self.expert_bias and self.update_rate:
                yield without_counts("--router.expert-bias")
            if self.aux_loss == "global_batch":
                yield without_counts("--router.aux-loss global_batch")
            if self.aux_loss == "sequence":
                yield without_tokens(
                    "--router.aux-loss sequence", ("all tokens of a pass count as one sequence")
                )
            if self.jitter_eps:
                yield without_tokens(
                    "--router.jitter-eps", "all passes of a step have the same noise on every rank"
                )

        @property
        def renormalised_anyway(self) -> bool:
            """The weights are the softmax over the kept logits."""
            return self.score_function == "softmax" and not self.pre_softmax

        @property
        def sums_to_one(self) -> bool:
            """A token's weights sum to 1."""
            return self.renormalise or self.renormalised_anyway

        @property
        def update_rate(self) -> float:
            """Change of the choice bias in a step."""
            return _UPDATE_RATE if self.bias_update_rate is None else self.bias_update_rate

    def __init__(self, config: Config, **common: Any) -> None:
        """``common``: the keywords of :class:`Router`."""
        super().__init__(config, **common)
        if config.aux_loss == "global_batch":
            self.register_buffer("share_E", torch.empty(self.num_experts, dtype=torch.float32))
        if config.expert_bias:
            self.register_buffer("choice_bias_E", torch.empty(self.num_experts, dtype=torch.float32))

    def reset_buffers(self) -> None:
        """See :meth:`Router.reset_buffers`."""
        super().reset_buffers()
        if self.config.aux_loss == "global_batch":
            self.share_E.fill_(1.0 / self.num_experts)
        if self.config.expert_bias:
            self.choice_bias_E.zero_()

    def matrix_std(self) -> float:
        """Standard deviation of the entries of a random matrix: ``init_std``, or the value that gives
        ``logit_std``.
        """
        wanted: float | None = self.config.logit_std
        own: float = getattr(self.config, "init_std", 0.0)
        return own if wanted is None else wanted / math.sqrt(self.hidden_size)

    def view(self, x_TD: Tensor, now: Pass) -> Tensor:
        """In training, the input with jitter; if the positions of tokens are unknown, they count from 0."""
        eps = self.config.jitter_eps
        if not (eps and now.training):
            return x_TD
        places_T = (
            torch.arange(x_TD.size(0), device=x_TD.device) if now.tokens is None else now.tokens.places_T
        )
        return x_TD.float() * jitter(
            places_T, x_TD.size(1), eps, seed=self.seed, step=now.step, layer=self.layer_number
        )

    def choose(self, logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest scores, with the choice bias if there is one, and the weights that the options
        define.
        """
        config = self.config
        choice_bias_E = self.choice_bias_E if config.expert_bias else None
        return scored_topk(
            logits_TE,
            k,
            score=config.score_function,
            renormalise=config.sums_to_one,
            choice_bias_E=choice_bias_E,
            groups=config.groups,
        )

    def balance_losses(self, logits_TE: Tensor, experts_TK: Tensor, now: Pass) -> dict[str, Tensor]:
        """``aux`` of the kind in ``aux_loss``, over probabilities of the score function, and ``z``."""
        losses: dict[str, Tensor] = {}
        if self.aux_loss_coeff and self.config.aux_loss != "off":
            losses["aux"] = self._balance(logits_TE, experts_TK, now)
        if self.z_loss_coeff:
            losses["z"] = z_loss(logits_TE, self.over_shards, coefficient=self.z_loss_coeff)
        return losses

    @property
    def plain_losses(self) -> dict[str, float]:
        """See :attr:`Router.plain_losses`."""
        found = {"z": self.z_loss_coeff}
        if self.config.aux_loss == "micro_batch" and self.config.score_function == "softmax":
            found["aux"] = self.aux_loss_coeff
        return found

    def _balance(self, logits_TE: Tensor, experts_TK: Tensor, now: Pass) -> Tensor:
        probs_TE = log_scores(logits_TE, self.config.score_function).softmax(-1)
        if self.config.aux_loss == "global_batch":
            return self.aux_loss_coeff * known_load_loss(probs_TE, self.share_E, self.over_shards)
        # else all tokens are one sequence; without tokens, the loss is 0 either way
        if self.config.aux_loss == "sequence" and now.tokens is not None and len(logits_TE):
            sequence_T = now.tokens.places_T // now.tokens.seq_length
            sequence_T = sequence_T - sequence_T.min()
            number = int(sequence_T.max()) + 1 if now.tokens.sequences is None else now.tokens.sequences
            loss = sequence_loss(probs_TE, experts_TK, sequence_T, number, self.over_shards)
            return self.aux_loss_coeff * loss
        return switch_loss(probs_TE, experts_TK, self.over_shards, coefficient=self.aux_loss_coeff)

    def end_step(self, counts: StepCounts) -> None:
        """Update the buffers that depend on the load of the global batch."""
        load_E = counts.load_E
        with torch.no_grad():
            if self.config.aux_loss == "global_batch":
                self.share_E.copy_(load_E / load_E.sum())
            if self.config.expert_bias:
                self.choice_bias_E.add_(bias_step(load_E, self.config.update_rate).to(self.choice_bias_E))

    def folded_options(self) -> dict[str, Any]:
        """All options of this family: the ``topk`` router has them too."""
        common = {field.name for field in fields(Router.Config)}
        names = [field.name for field in fields(ChoosingRouter.Config) if field.name not in common]
        return {name: getattr(self.config, name) for name in names}

    def folded_buffers(self) -> dict[str, Tensor]:
        """The buffers that balance the choice."""
        return {name: buffer for name, buffer in self.named_buffers() if name in ("share_E", "choice_bias_E")}


def no_gradient_at_k1(name: str, topk: int) -> Iterator[str]:
    """The warning of the methods that take the softmax over the kept logits."""
    if topk == 1:
        yield (
            f"router {name} with k = 1: the routing weight of the only chosen expert is always 1, so the "
            "language-model loss gives the router no gradient; only --moe-aux-loss-coeff and "
            "--moe-z-loss-coeff train the router"
        )


def without_counts(what: str) -> str:
    """The warning that ``what`` needs :meth:`Router.end_step`."""
    return (
        f"{what} needs the expert loads of all ranks in each optimizer step; create "
        "megatron_hyperrouter.RouterSteps for the model, and call its begin() and end() around each step"
    )


def without_tokens(what: str, instead: str) -> str:
    """The warning that ``what`` needs ``Tokens``; ``instead``: what happens without them."""
    return (
        f"{what} needs the ids or positions of the tokens; without them, {instead}. Create "
        "megatron_hyperrouter.RouterSteps for the model, call its begin() and end() around "
        "each step, and its arrive() before each micro-batch"
    )
