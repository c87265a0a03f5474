"""Competition between experts: the score of an expert's output, the router's loss on the scores, and which
layers compete in which steps.

CompeteSMoE version 1: arXiv 2402.02526; version 2: arXiv 2505.13380.

Legend: ``T`` tokens, ``D`` hidden size, ``E`` experts of the whole model, ``K`` winners of each token,
``X`` any leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hyperrouter.ops.coin import shared_coin

WINDOW = 256  # steps that are planned together; a competition never leaves its window


def norm_scores(outputs_XD: Tensor) -> Tensor:
    """Version 1: the Euclidean norm of an expert's output; float32 ``_X``."""
    norms_X: Tensor = torch.linalg.vector_norm(outputs_XD.float(), dim=-1)
    return norms_X


def softplus_scores(outputs_XD: Tensor) -> Tensor:
    """Version 2: the mean over features of softplus of an expert's output, ln 2 for a zero output;
    float32 ``_X``, never below 0.
    """
    return F.softplus(outputs_XD.float()).mean(-1)


def shares(scores_TK: Tensor) -> Tensor:
    """Version 2: scores divided by their sum over the winners."""
    return scores_TK / scores_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(scores_TK.dtype).tiny)


def winners_target(scores_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Version 1: the softmax over the winners' scores, at the winners' ids, and zero for the losers;
    ``_TE``.
    """
    return torch.zeros_like(scores_TE).scatter(-1, experts_TK, scores_TE.gather(-1, experts_TK).softmax(-1))


def squared_error(probs_TE: Tensor, target_TE: Tensor) -> Tensor:
    """Mean over the experts of squared differences, for each token; ``_T``."""
    return (probs_TE - target_TE).square().mean(-1)


def divergence(logits_TE: Tensor, target_TE: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the softmax of the logits from the target, in nats, for each token;
    ``_T``.
    """
    negative_entropy_TE: Tensor = torch.special.xlogy(target_TE, target_TE)
    return (negative_entropy_TE - target_TE * logits_TE.log_softmax(-1)).sum(-1)


def hybrid_error(probs_TE: Tensor, target_TE: Tensor, experts_TK: Tensor, theta: float) -> Tensor:
    """Version 2: the squared error over all experts, plus ``theta`` times that over the winners, for each
    token; ``_T``.
    """
    winners_T = squared_error(probs_TE.gather(-1, experts_TK), target_TE.gather(-1, experts_TK))
    return squared_error(probs_TE, target_TE) + theta * winners_T


def similarity_of_winners(outputs_TKD: Tensor) -> Tensor:
    """Version 2: sum of the K x K matrix of cosines, its diagonal zero, divided by K^2: (K - 1) / K of
    the mean over pairs; ``_T``.

    A zero output has cosine 0 with all others.
    """
    k = outputs_TKD.size(-2)
    unit_TKD = F.normalize(outputs_TKD.float(), dim=-1, eps=1e-8)
    off_KK = 1.0 - torch.eye(k, device=unit_TKD.device, dtype=unit_TKD.dtype)
    cosines_TKK: Tensor = unit_TKD @ unit_TKD.transpose(-1, -2) * off_KK
    return cosines_TKK.sum((-1, -2)) / k**2


def decaying_rate(block: int) -> float:
    """Version 1's ``function`` schedule: the probability that a layer competes in block i, ``2 / (2 +
    sqrt(i + 1))``. It falls from 2/3.
    """
    return 2.0 / (2.0 + math.sqrt(block + 1))


class Capped(NamedTuple):
    """Version 2's schedule: each layer draws in each step, and at most ``max_competing`` layers compete
    in one step.
    """

    seed: int
    rate: float  # chance of one layer in one step
    warm_up: int  # steps without competition
    num_layers: int
    max_competing: int

    def competes(self, *, step: int, layer: int) -> bool:
        """Whether the layer (from 1) competes in the step after ``step`` completed ones."""
        return step >= self.warm_up and layer in planned(self, step // WINDOW)[step % WINDOW]


@lru_cache(
    maxsize=256
)  # shared by the layers of a process, unless each counts its own; 60 layers: 40 ms in 256 steps
def planned(schedule: Capped, window: int) -> tuple[frozenset[int], ...]:
    """The layers that compete in each of steps from ``window * WINDOW`` on; a pure function, the same
    on every rank.

    Draws are placed by step, and within a step in random order, so that no layer is favoured.  If a step
    is full, a draw moves to the nearest earlier step of the window that has room for its layer, else to
    the nearest later one; else it is dropped.  Draws are dropped only if the rate asks for more than
    ``max_competing`` layers per step throughout a window.  Windows are counted from step 0.  They do not
    depend on each other or on the length of the run, so a longer run begins like a shorter one.
    """
    first = max(schedule.warm_up - window * WINDOW, 0)
    chosen: list[set[int]] = [set() for _ in range(WINDOW)]

    def has_room(place: int, layer: int) -> bool:
        return len(chosen[place]) < schedule.max_competing and layer not in chosen[place]

    for step in range(first, WINDOW):
        nearest = (step, *range(step - 1, first - 1, -1), *range(step + 1, WINDOW))
        for layer in _drawn(schedule, window * WINDOW + step):
            place = next((place for place in nearest if has_room(place, layer)), None)
            if place is not None:
                chosen[place].add(layer)
    return tuple(map(frozenset, chosen))


def _drawn(schedule: Capped, step: int) -> Iterator[int]:
    coins = (
        (shared_coin(seed=schedule.seed, step=step, layer=layer), layer)
        for layer in range(1, schedule.num_layers + 1)
    )
    return (layer for coin, layer in sorted(coins) if coin < schedule.rate)
