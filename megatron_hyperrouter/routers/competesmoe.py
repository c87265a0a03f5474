"""CompeteSMoE: in some passes all experts process the tokens, those with the strongest outputs win, and
the router learns to predict the winners.

``g = W x`` are the router's logits, ``E_i(x)`` the experts' outputs, ``S`` the chosen experts, ``w`` their
weights.  In an ordinary pass, and in evaluation, ``S`` = top-k of g and w = softmax over the chosen
logits. In a competing pass:

    .            version 1 (arXiv 2402.02526)            version 2 (arXiv 2505.13380)
    affinity     s_i = |E_i(x)|_2                        s_i = mean over features of softplus(E_i(x))
    winners      S = top-k of s                          S = top-k of s
    weights      w = softmax over the winners' s         w_i = s_i / sum_S s
    target       t = softmax over the winners' s,        t = softmax(s) over all experts
                     0 for the others
    router loss  mean_E (softmax(g) - t)^2,              mean_E (softmax(g) - t)^2
                     or KL(t || softmax(g))                  + theta mean_S (softmax(g) - t)^2
    diversity    none                                    sum_{i != j in S} cos(E_i(x), E_j(x)) / K^2
    balance      none                                    Switch's loss with the routes of S and softmax(s)

Each loss is a mean over the tokens of the micro-batch, times its coefficient.  The target has no gradient
and is in the order of expert ids.  These losses replace ``aux`` and ``z``, which apply to ordinary passes
only. Weights, diversity and balance train the winning experts through their outputs.  The outputs of the
losers stay on the ranks that made them, so in ``balance`` their scores are constants: all experts run once
without gradients (E/k of an ordinary forward pass), and the winners run once more with gradients.

Differences from the papers and the published code:

- The code of version 1 compares the target with logits in top-k order instead of id order, does not detach
  the target, and adds the last competition's loss to later steps.  Its ``combine_gate`` is not provided.
  Its coefficients 0.01 (load_balance) and 5 (alpha) are one coefficient here, 0.05.
- In the code of version 2, one rank plans all competitions of a run.  Here the plan is a function of
  (seed, step, layer), in windows of 256 steps (``ops/competition.py``).  It is neither sent nor saved, and
  a longer run begins like the shorter one, except for a warm-up that is a share of ``--train-iters``.
- The language-model sweep of version 2 has other values: rate 0.07, warm_up 0, theta 0.2, router_coeff
  0.001.

Legend: ``T`` tokens, ``D`` hidden size, ``E`` experts, ``K`` active experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor, nn

from megatron_hyperrouter.config.kinds import Count
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.errors import Problem
from megatron_hyperrouter.ops import competition
from megatron_hyperrouter.ops.balance import switch_loss, token_mean
from megatron_hyperrouter.ops.coin import shared_coin
from megatron_hyperrouter.ops.linear import float32_linear, float32_maths
from megatron_hyperrouter.routers.base import Pass, Router, Routing, RunFacts, uncompiled

Coefficient = Annotated[float, Ge(0.0)]


class Competition(Routing):
    """A decision with the scores of all experts, which ``refine`` passes on to ``combine``."""

    scores_TE: Tensor


class CompeteSMoERouter(Router, name="competesmoe"):
    """A trained linear router that also learns from competitions between all experts (CompeteSMoE).

    Without an expert bank it never competes and is a plain linear router.
    """

    needs_experts = True
    config: Config

    @dataclass(frozen=True, kw_only=True)
    class Config(Router.Config):
        """Options with the default None take the published value of the chosen version."""

        version: Annotated[
            Literal["v1", "v2"],
            "Score by which experts compete for a token. v1: the norm of an expert's output; v2: the mean "
            "softplus of an expert's output",
        ] = "v2"
        schedule: Annotated[
            Literal["fixed", "function", "capped"] | None,
            "Rule that decides in which steps the experts of a layer compete. fixed: each step, with "
            "probability --router.rate; function: block i of steps, with probability 2 / (2 + sqrt(i +"
            " 1)); capped: like fixed, but not in the warm-up, and in at most --router.max-competing "
            "layers per step; default: fixed for v1, capped for v2",
        ] = None
        rate: Annotated[
            float | None,
            Ge(0.0),
            Le(1.0),
            "Probability that the experts of a layer compete in a step; default: 0.03 for v1, 0.05 for v2",
        ] = None
        warm_up: Annotated[
            float,
            Ge(0.0),
            Lt(1.0),
            "With --router.schedule capped: length of the warm-up without competition, as a fraction of "
            "--train-iters",
        ] = 0.05
        max_competing: Annotated[
            Count, "With --router.schedule capped: maximum number of layers that compete in one step"
        ] = 3
        block_steps: Annotated[
            Count,
            "With --router.schedule function: number of steps in a block; a layer competes in all steps "
            "of a block or in none",
        ] = 1000
        router_coeff: Annotated[
            Coefficient | None, "Weight of the router loss; default: 0.05 for v1, 0.01 for v2"
        ] = None
        loss: Annotated[
            Literal["mse", "kl"],
            "With --router.version v1: type of the router loss between the router's probabilities and "
            "the softmax of the winning experts' scores",
        ] = "mse"
        theta: Annotated[
            Coefficient,
            "With --router.version v2: weight of an additional router loss, which covers only the "
            "winning experts",
        ] = 0.1
        diversity_coeff: Annotated[
            Coefficient | None,
            "Weight of the diversity loss: the cosine similarity between the outputs of the winning "
            "experts; default: 0 for v1, 0.01 for v2",
        ] = None
        balance_coeff: Annotated[
            Coefficient | None,
            "Weight of the load-balancing loss in steps with competition; default: 0 for v1, 0.01 for v2",
        ] = None
        init_std: Annotated[
            float, Ge(0.0), Role.INITIAL, "Standard deviation of the router's initial weights"
        ] = 0.02

        def problems(self, *, hidden_size: int, num_experts: int) -> Iterator[Problem]:
            """Options of another version or schedule, which would have no effect."""
            yield from super().problems(hidden_size=hidden_size, num_experts=num_experts)
            used = {
                "warm_up": ("schedule", ("capped",)),
                "max_competing": ("schedule", ("capped",)),
                "block_steps": ("schedule", ("function",)),
                "rate": ("schedule", ("fixed", "capped")),
                "loss": ("version", ("v1",)),
                "theta": ("version", ("v2",)),
            }
            yield from self.unused(used, {"version": self.version, "schedule": self.chosen("schedule")})

        def warnings(self, *, topk: int) -> Iterator[str]:
            """Warns if no layer ever competes, and if the weights give the router no gradient."""
            if self.chosen("rate") == 0.0 and self.chosen("schedule") != "function":
                yield (
                    "with --router.rate 0, no layer competes, and router competesmoe routes like router topk"
                )
            if topk == 1:
                yield (
                    "router competesmoe with k = 1: the routing weight of the only chosen expert is always "
                    "1, so the language-model loss gives the router no gradient; only competitions, "
                    "--moe-aux-loss-coeff and --moe-z-loss-coeff train the router"
                )

        def lost(self, *, num_layers: int, aux_loss_coeff: float) -> Iterator[str]:
            """Warns if ``max_competing`` limits the rate."""
            rate, most = self.chosen("rate"), self.max_competing
            if self.chosen("schedule") == "capped" and rate * num_layers > most:
                yield (
                    f"--router.rate {rate:g} means {rate * num_layers:.3g} competing layers in each "
                    f"step, but --router.max-competing {most} limits the rate to {most / num_layers:.3g}"
                )

        def competes(self, step: int, layer: int, *, seed: int, facts: RunFacts) -> bool:
            """Whether that layer competes in the training step after ``step`` completed ones."""
            schedule: str = self.chosen("schedule")
            rate: float = self.chosen("rate")
            if schedule == "capped":
                plan = competition.Capped(
                    seed,
                    rate,
                    warm_up=int(self.warm_up * facts.train_iters),
                    # facts left out: this layer and those before it
                    num_layers=max(facts.num_layers, layer),
                    max_competing=self.max_competing,
                )
                return plan.competes(step=step, layer=layer)
            if schedule == "function":
                step //= self.block_steps
                rate = competition.decaying_rate(step)
            return shared_coin(seed=seed, step=step, layer=layer) < rate

        def variant(self, step: int, layers: Sequence[int], **run: int) -> str:
            """Steps in which a layer competes; ``run``: seed, num_layers, train_iters."""
            facts = RunFacts(run["num_layers"], run["train_iters"])
            competing = any(self.competes(step, layer, seed=run["seed"], facts=facts) for layer in layers)
            return "competing" if competing else ""

        def chosen(self, option: str) -> Any:
            """The value of an option or, if it is not set, the published value for this version."""
            value = getattr(self, option)
            return _PUBLISHED[self.version][option] if value is None else value

    def __init__(self, config: Config, **common: Any) -> None:
        """``common``: the keywords of :class:`Router`; ``facts`` has the layers of the model and the
        steps of the run.
        """
        super().__init__(config, **common)
        self.weight_ED = nn.Parameter(torch.empty(self.num_experts, self.hidden_size))
        self.score = competition.norm_scores if config.version == "v1" else competition.softplus_scores
        self.reset()

    def reset_parameters(self, draw: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """W ~ N(0, init_std^2)."""
        with torch.no_grad():
            self.weight_ED.copy_(draw("weight_ED", tuple(self.weight_ED.shape)) * self.config.init_std)

    def logits(self, x_TD: Tensor) -> Tensor:
        """``W x``."""
        return float32_linear(x_TD, self.weight_ED.float())

    def linear(self) -> tuple[Tensor, Tensor | None]:
        """The trained weights themselves, which evaluation uses."""
        return self.weight_ED.float(), None

    @uncompiled  # type: ignore[untyped-decorator]
    def competes(self, step: int) -> bool:
        """Whether this layer competes in the training step after ``step`` completed ones; the same on
        every rank.
        """
        return self.config.competes(step, self.layer_number, seed=self.seed, facts=self.facts)

    def wants_outputs(self, now: Pass) -> bool:
        """True in competing passes: in training, with an expert bank, when this layer competes."""
        return now.training and now.experts is not None and self.competes(now.step)

    def balance_losses(self, logits_TE: Tensor, experts_TK: Tensor, now: Pass) -> dict[str, Tensor]:
        """The losses of an ordinary pass; none in a competing pass."""
        return {} if self.wants_outputs(now) else super().balance_losses(logits_TE, experts_TK, now)

    def refine(self, first: Routing, x_TD: Tensor, now: Pass) -> Routing:
        """In a competing pass: the winners, and the router's loss; weights are provisional until
        :meth:`combine`.
        """
        if now.experts is None or not self.wants_outputs(now):
            return first
        scores_TE = now.experts.scores_TE(x_TD, self.score).detach().float()
        experts_TK = self.best(scores_TE, now.k)
        distance = token_mean(self._distances(first.logits_TE, scores_TE, experts_TK), self.over_shards)
        losses = {"competition": self.config.chosen("router_coeff") * distance}
        routing = Competition(
            first.logits_TE, self._mix(scores_TE.gather(-1, experts_TK)), experts_TK, losses
        )
        routing.scores_TE = scores_TE
        return routing

    def combine(self, routing: Routing, x_TD: Tensor, outputs_TKD: Tensor, now: Pass) -> Routing:
        """Compute weights and losses from the winners' outputs, so that they train the winners."""
        assert isinstance(routing, Competition), "call combine() only after a competing pass"
        losses, experts_TK = dict(routing.losses), routing.experts_TK
        with float32_maths(x_TD.device):
            scores_TK = self.score(outputs_TKD)
            if coefficient := self.config.chosen("diversity_coeff"):
                losses["diversity"] = coefficient * token_mean(
                    competition.similarity_of_winners(outputs_TKD), self.over_shards
                )
            if coefficient := self.config.chosen("balance_coeff"):
                probs_TE = routing.scores_TE.scatter(-1, experts_TK, scores_TK).softmax(-1)
                losses["competition_balance"] = coefficient * switch_loss(
                    probs_TE, experts_TK, self.over_shards
                )
            return routing._replace(weights_TK=self._mix(scores_TK), losses=losses)

    def _mix(self, scores_TK: Tensor) -> Tensor:
        v1 = self.config.version == "v1"
        return self.scaled(scores_TK.softmax(-1) if v1 else competition.shares(scores_TK))

    def _distances(self, logits_TE: Tensor, scores_TE: Tensor, experts_TK: Tensor) -> Tensor:
        if self.config.version == "v2":
            return competition.hybrid_error(
                logits_TE.softmax(-1), scores_TE.softmax(-1), experts_TK, self.config.theta
            )
        target_TE = competition.winners_target(scores_TE, experts_TK)
        if self.config.loss == "kl":
            return competition.divergence(logits_TE, target_TE)
        return competition.squared_error(logits_TE.softmax(-1), target_TE)


_PUBLISHED: dict[str, dict[str, Any]] = {
    "v1": {
        "schedule": "fixed",
        "rate": 0.03,
        "router_coeff": 0.05,
        "diversity_coeff": 0.0,
        "balance_coeff": 0.0,
    },
    "v2": {
        "schedule": "capped",
        "rate": 0.05,
        "router_coeff": 0.01,
        "diversity_coeff": 0.01,
        "balance_coeff": 0.01,
    },
}
