"""Choice of the k best experts of each token.

Legend: ``T`` tokens, ``E`` experts of the whole model, ``K`` active experts, ``G`` groups of ``M`` experts
each, of which a token may use ``C``.
"""

from __future__ import annotations

import operator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Score = Literal["softmax", "sigmoid"]

# On a CPU, a sort of all E is slow. T = 1024, E = 64, k = 2: 2.2 ms; rounds of argmax 0.3 ms, keys 0.8 ms
_ROUNDS_PAY_FROM = 16  # experts for each of a few rounds
_MOST_ROUNDS = 4
_KEYS_PAY_FROM = 32  # experts


class Groups(NamedTuple):
    """``total`` equal groups of neighbouring experts; a token may use ``chosen`` of them.

    DeepSeek-V2 (arXiv 2405.04434, device-limited routing) and DeepSeek-V3 (arXiv 2412.19437,
    node-limited).
    """

    total: int
    chosen: int


def topk_softmax(logits_TE: Tensor, k: int, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
    """Choose the experts with the k largest logits for each token, and weight them with the softmax over
    these k logits, as in SMoE, SMoE-Dropout and HyperRouter.

    Returns ``(weights_TK, experts_TK)``, best expert first.  The weights of a token sum to 1, and
    ``experts_TK`` has int64 numbers of experts.  If two logits are equal, the expert with the lower number
    comes first.  At k = 1, the weight is always 1, so the logits get no gradient.  With ``groups``, each
    token uses only the experts of its best groups.  Raises ValueError unless 1 <= k <= E.
    """
    experts_TK = best_experts(logits_TE, k, groups)
    return logits_TE.gather(-1, experts_TK).softmax(-1), experts_TK


def softmax_topk(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most probable experts under the softmax over all E, with these probabilities as weights
    (Switch, arXiv 2101.03961).

    Returns ``(weights_TK, experts_TK)`` like :func:`topk_softmax`, but a row of weights sums to less than
    1 if k < E.
    """
    experts_TK = best_experts(logits_TE, k)
    return logits_TE.softmax(-1).gather(-1, experts_TK), experts_TK


def scored_topk(
    logits_TE: Tensor,
    k: int,
    *,
    score: Score = "softmax",
    renormalise: bool = True,
    choice_bias_E: Tensor | None = None,
    groups: Groups | None = None,
) -> tuple[Tensor, Tensor]:
    """The k experts with the largest ``s + choice_bias``, weighted by s: the softmax over all E, or the
    sigmoid of each logit.

    ``renormalise``: weights are divided by their sum.  With the softmax, that is :func:`topk_softmax`;
    without ``renormalise``, it is :func:`softmax_topk`. ``choice_bias_E`` changes only the choice, never a
    weight (arXiv 2408.15664, equation 3), and gets no gradient. ``groups`` limits the choice by the
    compared scores, as in Megatron-LM. Returns ``(weights_TK, experts_TK)``, with the largest compared
    score first; ids are int64.
    """
    # The scores rise with the logits, but round to equal numbers where logits still differ; sums of a group's
    # scores do not rise with sums of its logits.
    kept_logits = renormalise and score == "softmax"
    compared_TE = logits_TE if kept_logits or groups is None else scores(logits_TE, score)
    if choice_bias_E is not None:
        compared_TE = scores(logits_TE, score) + choice_bias_E
    experts_TK = best_experts(compared_TE, k, groups)
    if renormalise:
        return log_scores(logits_TE, score).gather(-1, experts_TK).softmax(-1), experts_TK
    return scores(logits_TE, score).gather(-1, experts_TK), experts_TK


def scores(logits_TE: Tensor, score: Score) -> Tensor:
    """``softmax`` over the experts, or ``sigmoid`` of each logit."""
    return logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()


def log_scores(logits_TE: Tensor, score: Score) -> Tensor:
    """The logarithm of :func:`scores` plus a number that is the same for all experts of a token.

    Its softmax is the scores divided by their sum, but without 0 / 0 if all of them underflow.
    """
    return logits_TE if score == "softmax" else F.logsigmoid(logits_TE)


def whole(k: object) -> int:
    """``k``, also as an integer of NumPy or torch; ValueError if it is a bool or no integer."""
    if type(k) is int:
        return k
    try:
        if isinstance(k, bool):
            raise TypeError
        return operator.index(k)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"topk = {k!r}: must be an integer") from None


def best_experts(scores_TE: Tensor, k: int, groups: Groups | None = None) -> Tensor:
    """Ids ``_TK`` of the k largest scores, largest first, equal scores in the order of their ids; without
    a gradient. ``groups``: only among the experts of each token's best groups.

    ``torch.topk`` does not define the order of equal scores, so devices could route one token to different
    experts.
    """
    num_experts = scores_TE.size(-1)
    if not 1 <= k <= num_experts:
        raise ValueError(f"k = {k}: must be from 1 to E = {num_experts}")
    scores_TE = scores_TE.detach()
    if groups is not None:
        scores_TE = within_best_groups(scores_TE, k, groups)
    if scores_TE.device.type == "cpu":
        if k <= _MOST_ROUNDS and num_experts >= _ROUNDS_PAY_FROM * k:
            return _by_rounds(scores_TE, k)
        if num_experts >= _KEYS_PAY_FROM and scores_TE.dtype == torch.float32:
            return _by_keys(scores_TE, k)
    # not a view of the whole sort: that would keep E ids of each token, and be copied by each reader
    return torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[..., :k].contiguous()


def within_best_groups(scores_TE: Tensor, k: int, groups: Groups) -> Tensor:
    """The same scores, but -inf for experts outside each token's best groups; without a gradient.

    The score of a group is the sum of its ``k // chosen`` best scores, as in Megatron-LM; with a small k
    at evaluation, of at least one.  Raises ValueError if the chosen groups have fewer than k experts.
    """
    size = scores_TE.size(-1) // groups.total
    if k > groups.chosen * size:
        raise ValueError(
            f"k = {k}: must be at most {groups.chosen * size}, the number of experts in "
            f"{groups.chosen} groups of {size} experts"
        )
    counted = min(max(k // groups.chosen, 1), size)
    scores_TGM = scores_TE.detach().view(*scores_TE.shape[:-1], groups.total, size)
    group_score_TG = scores_TGM.topk(counted, dim=-1).values.sum(-1)
    best_TC = best_experts(group_score_TG, groups.chosen)
    inside_TG = torch.zeros_like(group_score_TG, dtype=torch.bool).scatter_(-1, best_TC, True)
    limited_TE: Tensor = scores_TGM.masked_fill(~inside_TG.unsqueeze(-1), -torch.inf).flatten(-2)
    return limited_TE


def _by_keys(scores_TE: Tensor, k: int) -> Tensor:
    """The k largest of integers that rise with the score and, for equal scores, fall with the id: none are
    equal, so ``torch.topk`` is defined.
    """
    # NaN, of either sign, counts as the largest number, as in a sort; -0 becomes 0, because both are equal
    clean_TE = scores_TE.nan_to_num(torch.inf, torch.inf, -torch.inf) + 0.0
    bits_TE = clean_TE.view(torch.int32)
    rising_TE = bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)  # the bits of negative numbers fall
    last = scores_TE.size(-1) - 1
    backwards_E = torch.arange(last, -1, -1, device=scores_TE.device)
    keys_TK = ((rising_TE.long() << 32) | backwards_E).topk(k, -1).values
    return last - (keys_TK & 0xFFFFFFFF)


def _by_rounds(scores_TE: Tensor, k: int) -> Tensor:
    """Take the best expert k times; argmax returns the first of equal values."""
    # a copy, in which -inf marks nothing but experts already taken
    rest_TE = scores_TE.clamp(min=torch.finfo(scores_TE.dtype).min)
    rounds = []
    for _ in range(k):
        best_T1 = rest_TE.argmax(-1, keepdim=True)
        rounds.append(best_T1)
        rest_TE = rest_TE.scatter(-1, best_T1, -torch.inf)
    return torch.cat(rounds, -1)
