"""How a probe set's routes change over the checkpoints of a run.

Legend: ``N`` tokens of the probe set, ``K`` active experts, ``E`` experts.  Ids of chosen experts are
``experts_NK``, the heaviest first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def saturation(experts_NK: Tensor, final_NK: Tensor) -> float:
    """Share of the choices that the final checkpoint makes too (OLMoE, arXiv 2409.02060): 1 at the end."""
    same_NKK = experts_NK.unsqueeze(2) == final_NK.unsqueeze(1)
    return float(same_NKK.any(2).double().mean())


def fluctuation(experts_NK: Tensor, later_NK: Tensor) -> float:
    """Share of tokens whose first expert differs (StableMoE, arXiv 2204.08396)."""
    return float((experts_NK[:, 0] != later_NK[:, 0]).double().mean())


def chance(experts_NK: Tensor, num_experts: int) -> tuple[float, float]:
    """The values of :func:`saturation` and :func:`fluctuation` if each token drew its experts at random,
    with the loads in ``experts_NK``.
    """
    count, k = experts_NK.shape
    chosen_E = torch.bincount(experts_NK.flatten(), minlength=num_experts).double() / count
    first_E = torch.bincount(experts_NK[:, 0], minlength=num_experts).double() / count
    return float(chosen_E.square().sum() / k), float(1 - first_E.square().sum())
