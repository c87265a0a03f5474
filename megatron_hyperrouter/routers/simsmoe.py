"""SimSMoE: once two experts have shared many tokens, a loss on the similarity (CKA) of their outputs pushes
them apart (arXiv 2406.15883).

    logits  = W x (+ b);  S = the k largest;  weights = softmax over S
    c_ij   += share of the tokens of the step with both i and j in S, for all pairs i < j, after each step
    due     = pairs with c_ij > frequency when a step begins, at most ``max_pairs``, the largest first;
              their c_ij becomes 0 after the step
    loss    = coeff * sum over due pairs of [CKA_ij >= threshold] CKA_ij, in each micro-batch of the step
    CKA_ij  = CKA(head(E_i(x)), head(E_j(x))) over the tokens of the micro-batch with both i and j in S

Differences from the paper and its code:

- Any k >= 2 is allowed, not only 2.  Tokens are counted over the global batch, once per optimizer step, in
  a buffer that is saved; the published code counts in each replica's forward pass.  A pair is compared in
  the step after its count exceeds the frequency, so that all ranks know beforehand.
- As in the paper, the outputs that the layer has computed anyway are compared.  The published code
  computes them again, without dropout, from inputs that are detached from the graph.  Here the loss also
  reaches the layers below.
- The bandwidth of the kernel follows the distances (``bandwidth absolute`` has the published sigma).  At
  least ``min_tokens`` are needed (with 2, CKA is 1 for any experts).  At most ``max_tokens`` are compared,
  evenly spaced over the micro-batch.

Legend: ``T`` tokens on this rank, ``G`` tokens of the whole micro-batch, ``D`` hidden size, ``E`` experts,
``K`` active experts, ``P`` pairs i < j, ``R`` due pairs, ``N`` compared tokens, ``F`` features after the
head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from megatron_hyperrouter.config.kinds import Count
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.errors import Problem
from megatron_hyperrouter.ops.linear import float32_linear, float32_maths, reaching
from megatron_hyperrouter.ops.similarity import linear_cka, median_distance, rbf_cka
from megatron_hyperrouter.routers.base import Pass, Router, Routing, StepCounts
from megatron_hyperrouter.routers.choice import no_gradient_at_k1, without_counts


class SimSMoERouter(Router, name="simsmoe"):
    """A trained linear router with a loss that keeps experts different (SimSMoE)."""

    needs_experts = True
    config: Config
    pair_counts_P: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(Router.Config):
        """Published: sigma 0.8 with ``bandwidth`` = ``absolute``; in the code a ``linear`` head and a bias of
        the router.
        """

        init_std: Annotated[
            float, Ge(0.0), Role.INITIAL, "Standard deviation of the router's initial weights"
        ] = 0.02
        bias: Annotated[bool, "Add a trained bias to the logits"] = False
        similarity_coeff: Annotated[
            float, Ge(0.0), "Weight of the similarity loss; 0: no similarity loss"
        ] = 0.01
        frequency: Annotated[
            float,
            Gt(0.0),
            "Compare two experts after every X global batches of shared tokens. A token is shared if "
            "it is routed to both experts",
        ] = 16.0
        threshold: Annotated[float, Ge(0.0), Le(1.0), "Ignore pairs of experts with a similarity below X"] = (
            0.5
        )
        kernel: Annotated[Literal["rbf", "linear"], "Kernel of the CKA similarity"] = "rbf"
        bandwidth: Annotated[
            Literal["median", "absolute"],
            "Unit of --router.sigma. median: the median distance between the compared outputs; "
            "absolute: no unit",
        ] = "median"
        sigma: Annotated[
            float,
            Gt(0.0),
            "With --router.kernel rbf: bandwidth of the kernel, in the unit given by --router.bandwidth",
        ] = 0.8
        head: Annotated[
            Literal["mlp", "linear"],
            (
                "Type of the trained projection of expert outputs before a comparison; all experts of a "
                "layer share one projection"
            ),
        ] = "mlp"
        head_width: Annotated[Count, "With --router.head mlp: number of hidden units"] = 64
        head_features: Annotated[
            Count | None, "Output size of the projection --router.head; default: --num-experts"
        ] = None
        min_tokens: Annotated[
            int,
            Ge(3),
            "Compare two experts only in micro-batches with at least N tokens that are routed to "
            "both experts",
        ] = 8
        max_tokens: Annotated[
            int, Ge(3), "Maximum number of tokens of a micro-batch to use for the comparison of two experts"
        ] = 512
        max_pairs: Annotated[
            Count,
            (
                "Maximum number of pairs of experts to compare in one step; further pairs wait for a "
                "later step"
            ),
        ] = 8

        def problems(self, *, hidden_size: int, num_experts: int) -> Iterator[Problem]:
            """``max_tokens`` must be at least ``min_tokens``."""
            yield from super().problems(hidden_size=hidden_size, num_experts=num_experts)
            if self.max_tokens < self.min_tokens:
                rule = f"must be at least --router.min-tokens = {self.min_tokens}"
                yield Problem(
                    "--router.max-tokens",
                    self.max_tokens,
                    rule,
                    ("raise --router.max-tokens, or lower --router.min-tokens"),
                )

        def warnings(self, *, topk: int) -> Iterator[str]:
            """At k = 1 no two experts share a token; options of another kernel or head have no effect."""
            yield from no_gradient_at_k1("simsmoe", topk)
            used = {
                "bandwidth": ("kernel", ("rbf",)),
                "sigma": ("kernel", ("rbf",)),
                "head_width": ("head", ("mlp",)),
            }
            for problem in self.unused(used, {"kernel": self.kernel, "head": self.head}):
                yield f"{problem.field} {problem.rule}"
            if topk == 1:
                yield (
                    "router simsmoe with k = 1: each token has one expert, so "
                    "the similarity loss has no effect"
                )

        def unserved(self) -> Iterator[str]:
            """The similarity loss, which needs the counts of pairs."""
            if self.similarity_coeff:
                yield without_counts("the similarity loss of router simsmoe")

    def __init__(self, config: Config, **common: Any) -> None:
        """``common``: the keywords of :class:`Router`."""
        super().__init__(config, **common)
        D, E = self.hidden_size, self.num_experts
        features = config.head_features or E
        self.weight_ED = nn.Parameter(torch.empty(E, D))
        self.bias_E = nn.Parameter(torch.empty(E)) if config.bias else None
        mlp = config.head == "mlp"
        self.head_in_WD = nn.Parameter(torch.empty(config.head_width, D)) if mlp else None
        self.head_in_bias_W = nn.Parameter(torch.empty(config.head_width)) if mlp else None
        self.head_out_FW = nn.Parameter(torch.empty(features, config.head_width if mlp else D))
        self.register_buffer("pair_counts_P", torch.empty(self.num_pairs, dtype=torch.float64))
        self._due: tuple[tuple[int, int], ...] | None = None  # to be read from the buffer
        self.reset()

    def reset_parameters(self, draw: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """W ~ N(0, init_std^2); the head's layers ~ N(0, 1 / fan-in); biases 0."""
        stds = {"weight_ED": self.config.init_std}
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 1:
                    parameter.zero_()
                else:
                    parameter.copy_(
                        draw(name, tuple(parameter.shape)) * stds.get(name, parameter.size(1) ** -0.5)
                    )

    def reset_buffers(self) -> None:
        """See :meth:`Router.reset_buffers`."""
        super().reset_buffers()
        self.pair_counts_P.zero_()
        self._due = None

    # -------------------------------------------------------------------------------------------- routing
    def logits(self, x_TD: Tensor) -> Tensor:
        """``W x + b``."""
        return float32_linear(x_TD, *self.linear())

    def refine(self, first: Routing, x_TD: Tensor, now: Pass) -> Routing:
        """The same decision.  The head gets a zero gradient, because hosts wait for one even in passes
        without a comparison.
        """
        return first._replace(weights_TK=reaching(first.weights_TK, *self._head_parameters()))

    def linear(self) -> tuple[Tensor, Tensor | None]:
        """The trained weights themselves."""
        return self.weight_ED.float(), None if self.bias_E is None else self.bias_E.float()

    # ------------------------------------------------------------------------------------------ comparing
    def wants_outputs(self, now: Pass) -> bool:
        """True in training, if pairs are due and each token has at least two experts."""
        return now.training and now.k >= 2 and self.config.similarity_coeff > 0 and bool(self.due_pairs())

    def combine(self, routing: Routing, x_TD: Tensor, outputs_TKD: Tensor, now: Pass) -> Routing:
        """Add the loss ``similarity``; the weights do not change.  Raises ValueError if several ranks
        share the micro-batch and the positions of its tokens are not known.
        """
        with float32_maths(x_TD.device):
            cka_R, enough_R = self.compare(routing.experts_TK, outputs_TKD, now)
        counts_R = enough_R & (cka_R.detach() >= self.config.threshold)
        loss = self.config.similarity_coeff * torch.where(counts_R, cka_R, 0.0).sum()
        # the loss value is divided among the ranks; the gradient already covers only this rank's rows
        if self.over_shards is not None:
            loss = loss - loss.detach() + loss.detach() / self.over_shards(torch.ones_like(loss))
        return routing._replace(losses={**routing.losses, "similarity": loss})

    def compare(self, experts_TK: Tensor, outputs_TKD: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        """CKA of each due pair, ``_R``, and whether it had enough tokens; the same on all ranks that share
        the micro-batch.
        """
        pairs_R2 = torch.tensor(self.due_pairs(), device=experts_TK.device).view(-1, 2)
        places_T = self._places(experts_TK, now)
        experts_GK, places_G = self._of_all(experts_TK), self._of_all(places_T)
        slots_RG2, rows_RN, valid_RN = shared_tokens(experts_GK, places_G, pairs_R2, self.config.max_tokens)
        compared_RN = torch.where(valid_RN, places_G[rows_RN], -1)
        wanted = (torch.isin(places_T, compared_RN).unsqueeze(1) & torch.isin(experts_TK, pairs_R2)).nonzero(
            as_tuple=True
        )
        features_TKF = outputs_TKD.new_zeros(*experts_TK.shape, self.head_out_FW.size(0), dtype=torch.float32)
        # only of these rows, so that the head stays cheap for any T and K
        features_TKF[wanted] = self.project(outputs_TKD[wanted])
        features_GKF = self._of_all(features_TKF)
        slots_RN2 = slots_RG2.gather(1, rows_RN.unsqueeze(-1).expand(-1, -1, 2))
        first_RNF, second_RNF = (features_GKF[rows_RN, slots_RN2[..., side]] for side in (0, 1))
        return self.similarity(first_RNF, second_RNF, valid_RN), valid_RN.sum(1) >= self.config.min_tokens

    def project(self, outputs_ND: Tensor) -> Tensor:
        """Features ``_NF`` of expert outputs: one hidden layer with GELU, or a linear map; float32."""
        hidden = outputs_ND.float()
        if self.head_in_WD is not None and self.head_in_bias_W is not None:
            hidden = F.gelu(F.linear(hidden, self.head_in_WD.float(), self.head_in_bias_W.float()))
        return F.linear(hidden, self.head_out_FW.float())  # no bias: CKA would give it no gradient

    def similarity(self, x_RNF: Tensor, y_RNF: Tensor, valid_RN: Tensor) -> Tensor:
        """CKA of each of R pairs of features, ``_R``."""
        if self.config.kernel == "linear":
            return linear_cka(x_RNF, y_RNF, valid_RN)
        if self.config.bandwidth == "median":
            x_RNF, y_RNF = (side / median_distance(side, valid_RN)[:, None, None] for side in (x_RNF, y_RNF))
        return rbf_cka(x_RNF, y_RNF, self.config.sigma, valid_RN)

    # ------------------------------------------------------------------------------------------- counting
    @property
    def num_pairs(self) -> int:
        """Pairs i < j of experts."""
        return self.num_experts * (self.num_experts - 1) // 2

    @property
    def num_extra_counts(self) -> int:
        """One for each pair, in the order (0, 1), (0, 2), ... (1, 2), ..."""
        return self.num_pairs

    def extra_counts(self, routing: Routing) -> Tensor:
        """Tokens that both experts of a pair were chosen for."""
        E = self.num_experts
        chosen_TE = routing.logits_TE.new_zeros(routing.experts_TK.size(0), E).scatter_(
            1, routing.experts_TK, 1.0
        )
        with float32_maths(chosen_TE.device):  # an engine may call this under autocast
            shared_EE = (chosen_TE.mT @ chosen_TE).double()  # exact: sums of ones below 2^24
        return shared_EE[tuple(torch.triu_indices(E, E, 1, device=shared_EE.device))]

    def end_step(self, counts: StepCounts) -> None:
        """Add this step's counts, as shares of its tokens; the counts of pairs that were due start again at
        0.
        """
        compared = self.due_pairs()
        with torch.no_grad():
            self.pair_counts_P += counts.extra.to(self.pair_counts_P) / counts.tokens
            if compared:
                self.pair_counts_P[[self._index(*pair) for pair in compared]] = 0.0
        self._due = None

    def due_pairs(self) -> tuple[tuple[int, int], ...]:
        """The pairs to compare in this step, from the buffer alone."""
        if self._due is None:
            counts_P = self.pair_counts_P.cpu()
            over_R = (counts_P > self.config.frequency).nonzero().flatten()
            first_R = over_R[
                counts_P[over_R].sort(descending=True, stable=True).indices[: self.config.max_pairs]
            ]
            pairs_R2 = torch.triu_indices(self.num_experts, self.num_experts, 1, device="cpu")[:, first_R].t()
            self._due = tuple((i, j) for i, j in pairs_R2.tolist())
        return self._due

    def begin_step(self) -> None:
        """The counts may have been loaded; they are read now, where the engine waits anyway, not in the next
        forward pass.
        """
        self._due = None
        self.due_pairs()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._due = None

    # -------------------------------------------------------------------------------------------- helpers
    def _index(self, i: int, j: int) -> int:
        return i * (2 * self.num_experts - i - 1) // 2 + j - i - 1

    def _head_parameters(self) -> list[nn.Parameter]:
        return [part for name, part in self.named_parameters() if name.startswith("head_")]

    def _places(self, experts_TK: Tensor, now: Pass) -> Tensor:
        if now.tokens is not None:
            return now.tokens.places_T
        if self.gather_shards is not None:
            raise ValueError(
                "router simsmoe needs the positions of the tokens if several ranks share a "
                "micro-batch; call it with tokens=Tokens(...)"
            )
        return torch.arange(experts_TK.size(0), device=experts_TK.device)

    def _of_all(self, rows: Tensor) -> Tensor:
        return rows if self.gather_shards is None else self.gather_shards(rows)


def shared_tokens(
    experts_GK: Tensor, places_G: Tensor, pairs_R2: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that have both experts of each pair: all, or ``most`` of them, evenly spaced in the order
    of their positions.

    Returns the places of the pair's two experts among a token's K, ``slots_RG2``; the rows of these
    tokens, ``_RN``; and which of these rows are valid (boolean ``_RN``): N is the largest number of tokens
    of a pair.
    """
    has_RG2K = experts_GK.unsqueeze(1) == pairs_R2[:, None, :, None]
    slots_RG2 = has_RG2K.byte().argmax(-1)
    order_G = places_G.argsort(stable=True)
    both_RG = has_RG2K.any(-1).all(-1)[:, order_G]
    before_RG = both_RG.cumsum(1) - 1
    count_R1 = both_RG.sum(1, keepdim=True)
    kept_R1 = count_R1.clamp(max=most)
    # of n tokens m stay: those where floor(rank * m / n) is about to go up, so m = n keeps all
    evenly_RG = (before_RG + 1) * kept_R1 // count_R1.clamp(min=1) > before_RG * kept_R1 // count_R1.clamp(
        min=1
    )
    widest = int(kept_R1.max())  # the only number that the host waits for
    first_RN = (both_RG & evenly_RG).byte().argsort(dim=1, descending=True, stable=True)[:, :widest]
    valid_RN = torch.arange(widest, device=experts_GK.device) < kept_R1
    return slots_RG2, order_G[first_RN], valid_RN
