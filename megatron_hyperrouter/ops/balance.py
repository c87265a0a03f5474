"""How evenly tokens are distributed over experts: losses for training, and numbers to watch.

Legend: ``T`` tokens, ``N`` sequences, ``E`` experts of the whole model, ``K`` active experts.  Means are
over the given tokens, so the load is balanced within the caller's micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

OverShards = Callable[[Tensor], Tensor]


def switch_loss(
    probs_TE: Tensor,
    experts_TK: Tensor,
    over_shards: OverShards | None = None,
    *,
    load_E: Tensor | None = None,
    coefficient: float = 1.0,
) -> Tensor:
    """Load-balancing loss of Switch Transformers (arXiv 2101.03961, equation 4), for any k:
    ``E * sum_i f_i P_i``.

    ``f_i`` is the share of the routes (T * K in total) that go to expert i, and has no gradient.  ``P_i`` is
    the mean of ``probs_TE[:, i]``.  The result is a scalar.  It is 1 if the routes or the probabilities are
    uniform, and E if all tokens go to one expert with probability 1.

    Args:
        probs_TE: probability of each expert for each token.
        experts_TK: numbers of the chosen experts.
        over_shards: needed only if several ranks share a micro-batch: a function that sums a tensor over
            these ranks.  The result is then this rank's part of the loss.  The parts of all ranks, and their
            gradients, add up to those of one rank with all tokens.
        load_E: number of routes to each expert, if you have it already.
        coefficient: factor of the loss.
    """
    num_experts, topk = probs_TE.size(1), experts_TK.size(1)
    load_E = load(experts_TK, num_experts) if load_E is None else load_E
    sum_E = probs_TE.sum(0)
    if over_shards is None:  # the number of routes is known on the host
        scale = coefficient * num_experts * topk / max(experts_TK.numel(), 1) ** 2  # T = routes / K
        return torch.dot((load_E * scale).to(sum_E.dtype), sum_E)
    load_E = over_shards(load_E).to(probs_TE.dtype)
    num_routes = load_E.sum().clamp(min=1)
    return coefficient * num_experts * (load_E / num_routes * (sum_E * (topk / num_routes))).sum()


def overload_loss(
    values_TK: Tensor, experts_TK: Tensor, num_experts: int, over_shards: OverShards | None = None
) -> Tensor:
    """Balance loss of StableMoE (arXiv 2204.08396), ``1/T sum_i (n_i - n)/n sum_(routes to i) value``, for
    any k.

    ``n_i`` is the number of routes to expert i (no gradient), and ``n = T K / E`` its mean.  The paper has
    the sum over all tokens, at k = 1: T times this.  The loss is 0 if the routes are uniform.
    ``over_shards``: as in :func:`switch_loss`.
    """
    load_E = load(experts_TK, num_experts)
    load_E = (load_E if over_shards is None else over_shards(load_E)).to(values_TK.dtype)
    excess_E = load_E * num_experts / load_E.sum().clamp(min=1) - 1.0
    return token_mean((excess_E[experts_TK] * values_TK).sum(-1), over_shards)


def sequence_loss(
    probs_TE: Tensor,
    experts_TK: Tensor,
    sequence_T: Tensor,
    num_sequences: int,
    over_shards: OverShards | None = None,
) -> Tensor:
    """:func:`switch_loss` of each sequence by itself, averaged over the sequences (DeepSeek-V3, arXiv
    2412.19437, equation 17).

    ``sequence_T``: the number of each token's sequence, from 0.  ``over_shards``: as in :func:`switch_loss`;
    every rank has tokens of every sequence of the micro-batch, as under sequence and context parallelism.
    """
    num_experts, topk = probs_TE.size(1), experts_TK.size(1)
    load_NE = load(sequence_T[:, None] * num_experts + experts_TK, num_sequences * num_experts).view(
        num_sequences, num_experts
    )
    load_NE = (load_NE if over_shards is None else over_shards(load_NE)).to(probs_TE.dtype)
    routes_N1 = load_NE.sum(-1, keepdim=True).clamp(min=1)
    # A product, not index_add, whose order of addition varies on a GPU.
    belongs_NT = sequence_T == torch.arange(num_sequences, device=sequence_T.device).unsqueeze(1)
    sum_NE = belongs_NT.to(probs_TE.dtype) @ probs_TE
    return num_experts * (load_NE / routes_N1 * sum_NE * (topk / routes_N1)).sum(-1).mean()


def known_load_loss(probs_TE: Tensor, share_E: Tensor, over_shards: OverShards | None = None) -> Tensor:
    """``E * sum_i f_i P_i`` for given shares ``f_i``, which sum to 1; the loss is 1 if they are uniform.

    ``over_shards``: as in :func:`switch_loss`.
    """
    return token_mean(probs_TE @ (probs_TE.size(1) * share_E.to(probs_TE.dtype)), over_shards)


def bias_step(load_E: Tensor, rate: float) -> Tensor:
    """Change of the choice bias for balancing without a loss: ``rate * sign(mean load - load)`` (arXiv
    2408.15664, algorithm 1).
    """
    # integers: exact, where a mean would round
    return rate * torch.sign(load_E.sum() - load_E.numel() * load_E)


def z_loss(logits_TE: Tensor, over_shards: OverShards | None = None, *, coefficient: float = 1.0) -> Tensor:
    """Mean over tokens of ``logsumexp(logits)^2``, which keeps logits small (ST-MoE, arXiv 2202.08906,
    equation 5).

    ``over_shards``: as in :func:`switch_loss`; ``coefficient`` multiplies the loss.
    """
    if over_shards is None:
        factor = coefficient / max(logits_TE.size(0), 1)
        mean: Tensor = _SumOfSquares.apply(logits_TE, factor)  # type: ignore[no-untyped-call]
        return mean
    return coefficient * token_mean(logits_TE.logsumexp(-1).square(), over_shards)


class _SumOfSquares(torch.autograd.Function):
    """The sum of the squares of each row's log-sum-exp, times a factor.  Autograd would need twice as many
    operators.
    """

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, factor: float) -> Tensor:
        total_T = logits_TE.logsumexp(-1)
        ctx.save_for_backward(logits_TE, total_T)
        ctx.factor = factor
        return torch.dot(total_T, total_T) * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits_TE, total_T = ctx.saved_tensors
        slope_T = total_T * (grad * (2.0 * ctx.factor))
        return logits_TE.softmax(-1).mul_(slope_T.unsqueeze(1)), None


def token_mean(values_T: Tensor, over_shards: OverShards | None = None) -> Tensor:
    """Mean over the micro-batch's tokens, or 0 without tokens.  With ``over_shards``: this rank's part of
    that mean, as in :func:`switch_loss`.
    """
    if over_shards is None:
        return values_T.mean() if values_T.numel() else values_T.sum()
    return values_T.sum() / over_shards(values_T.new_full((1,), values_T.numel()))[0].clamp(min=1)


def entropy(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of the entropy of the softmax over all E experts, in nats: from 0 to ln E."""
    entropy_TE: Tensor = torch.special.entr(logits_TE.softmax(-1))
    return entropy_TE.sum(-1).mean()


def load(experts_TK: Tensor, num_experts: int) -> Tensor:
    """Routes to each expert, int64 ``_E``; they sum to T*K."""
    routes = experts_TK.reshape(-1)
    # not bincount: on a GPU it waits for the largest id, and its output size is unknown to a compiler
    return torch.zeros(num_experts, dtype=torch.int64, device=routes.device).scatter_(
        0, routes, 1, reduce="add"
    )
