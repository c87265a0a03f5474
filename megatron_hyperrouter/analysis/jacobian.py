"""The part of a MoE layer's Jacobian that comes from its router.

For ``y = sum_S w_i E_i(x)`` the Jacobian is ``J = J_E + J_R`` with ``J_E = sum_S w_i dE_i/dx`` and ``J_R =
sum_S E_i(x) (dw_i/dx)^T``.  With the softmax over the kept logits of a linear router, ``J_R = sum_S w_i
(E_i(x) - y) W_i^T``: its rank is at most k - 1, its rows are in the span of W, and at k = 1 it is zero.

Legend: ``T`` tokens, ``D`` hidden size, ``E`` experts, ``K`` active experts, ``F`` width of an expert, ``G
= 2 F`` for its two input matrices [gate; up], ``R`` dimensions of a subspace, ``P`` probes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT_UP_TO = 128  # hidden size; above it, the size of J is estimated with this many random probes
_TOLERANCE = 1e-5  # of a singular value relative to the largest: routers compute in float32


class Experts(NamedTuple):
    """The SwiGLU experts of a layer."""

    w1_EGD: Tensor
    w2_EDF: Tensor

    def outputs_ETD(self, x_TD: Tensor) -> Tensor:
        """Every expert's output for every token."""
        return torch.stack([self.one(expert, x_TD) for expert in range(self.w1_EGD.size(0))])

    def one(self, expert: int, x_TD: Tensor) -> Tensor:
        """One expert's output."""
        gate_TF, up_TF = F.linear(x_TD, self.w1_EGD[expert]).chunk(2, -1)
        return F.linear(F.silu(gate_TF) * up_TF, self.w2_EDF[expert])

    def along_TDP(self, expert: int, x_TD: Tensor, probes_DP: Tensor) -> Tensor:
        """One expert's Jacobian at each token, times ``probes_DP``."""
        gate_TF, up_TF = F.linear(x_TD, self.w1_EGD[expert]).chunk(2, -1)
        gate_FP, up_FP = (self.w1_EGD[expert] @ probes_DP).chunk(2)
        sigmoid_TF = gate_TF.sigmoid()
        slope_TF = sigmoid_TF * (1 + gate_TF * (1 - sigmoid_TF))  # of silu
        hidden_TFP = (slope_TF * up_TF).unsqueeze(-1) * gate_FP + F.silu(gate_TF).unsqueeze(-1) * up_FP
        return self.w2_EDF[expert] @ hidden_TFP


class RouterPart(NamedTuple):
    """Measures of J_R over some tokens."""

    share: float  # mean of |J_R|^2 / |J|^2
    rank: int  # the largest of J_R
    effective_rank: float  # of the mean of J_R^T J_R: exp of the entropy of its eigenvalues; 0 where J_R is 0


def weight_slopes(weights_of: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
    """``dw_i/dx`` of each chosen expert, ``_TKD``; ``weights_of``: inputs ``_TD`` to weights ``_TK``."""
    with torch.enable_grad():
        x_TD = x_TD.detach().requires_grad_()
        weights_TK = weights_of(x_TD)
        slopes = []
        for k in range(weights_TK.size(1)):
            found = None
            if weights_TK.requires_grad:
                (found,) = torch.autograd.grad(
                    weights_TK[:, k].sum(), x_TD, retain_graph=True, allow_unused=True
                )
            slopes.append(torch.zeros_like(x_TD) if found is None else found)
    return torch.stack(slopes, 1).detach()


def measure(
    experts: Experts, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, slopes_TKD: Tensor
) -> RouterPart:
    """The measures of J_R, in the dtype of ``x_TD``."""
    outputs_TKD = torch.zeros_like(slopes_TKD)
    probes_DP = probes(x_TD)
    along_TDP = x_TD.new_zeros(x_TD.size(0), x_TD.size(1), probes_DP.size(1))
    for expert in range(experts.w1_EGD.size(0)):
        token_R, place_R = (experts_TK == expert).nonzero(as_tuple=True)
        if not len(token_R):
            continue
        outputs_TKD[token_R, place_R] = experts.one(expert, x_TD[token_R])
        part_RDP = experts.along_TDP(expert, x_TD[token_R], probes_DP)
        along_TDP.index_add_(0, token_R, weights_TK[token_R, place_R, None, None] * part_RDP)
    along_TDP += outputs_TKD.mT @ (slopes_TKD @ probes_DP)
    own_TKK, inputs_TKK = outputs_TKD @ outputs_TKD.mT, slopes_TKD @ slopes_TKD.mT
    router_T = (own_TKK * inputs_TKK).sum((1, 2)).clamp(min=0)  # |J_R|^2
    whole_T = along_TDP.square().sum((1, 2))
    mean_DD = torch.einsum("tki,tkl,tlj->ij", slopes_TKD, own_TKK, slopes_TKD) / x_TD.size(0)
    share_T = torch.where(whole_T > 0, router_T / whole_T.clamp(min=1e-30), 0.0)
    return RouterPart(
        float(share_T.mean()), int(ranks(outputs_TKD, slopes_TKD).max()), effective_rank(mean_DD)
    )


def probes(x_TD: Tensor) -> Tensor:
    """Directions whose images have the Frobenius norm of a matrix: all of them, or random ones, for which
    this holds on average.
    """
    size = x_TD.size(1)
    if size <= EXACT_UP_TO:
        return torch.eye(size, dtype=x_TD.dtype, device=x_TD.device)
    generator = torch.Generator().manual_seed(0)
    drawn_DP = torch.randn(size, EXACT_UP_TO, generator=generator, dtype=torch.float64)
    probes_DP: Tensor = (drawn_DP / EXACT_UP_TO**0.5).to(x_TD)
    return probes_DP


def ranks(outputs_TKD: Tensor, slopes_TKD: Tensor) -> Tensor:
    """The rank of each token's J_R, ``_T``, from a ``K x K`` matrix with its singular values."""
    small = (torch.linalg.qr(each.mT.double())[1] for each in (outputs_TKD, slopes_TKD))
    left_TKK, right_TKK = small
    values_TK = torch.linalg.svdvals(left_TKK @ right_TKK.mT)
    scale_T1 = left_TKK.norm(dim=(1, 2)).unsqueeze(1) * right_TKK.norm(dim=(1, 2)).unsqueeze(1)
    found_T: Tensor = (values_TK > _TOLERANCE * scale_T1).sum(1)
    return found_T


def effective_rank(matrix_DD: Tensor) -> float:
    """exp of the entropy of the eigenvalues of a positive matrix, as shares of their sum; 0 for a matrix of
    zeros.
    """
    values_D = torch.linalg.eigvalsh(matrix_DD.double()).clamp(min=0)
    if not float(values_D.sum()) > 0:
        return 0.0
    return float(torch.special.entr(values_D / values_D.sum()).sum().exp())


def span(matrix_ED: Tensor) -> Tensor:
    """An orthonormal basis ``_DR`` of the rows."""
    _, values, rows_RD = torch.linalg.svd(matrix_ED.double(), full_matrices=False)
    basis_DR: Tensor = rows_RD[values > _TOLERANCE * values[0]].T
    return basis_DR


def drift(now_ED: Tensor, start_ED: Tensor) -> float:
    """How far the span of the rows has moved since the start: 0 for a router that never moved, about 1 - E
    / D for an unrelated one.
    """
    now_DR, start_DR = span(now_ED), span(start_ED)
    if not now_DR.size(1):
        return 0.0
    return max(1.0 - float((start_DR.T @ now_DR).square().sum()) / now_DR.size(1), 0.0)


def inside_span(matrix_ED: Tensor, x_TD: Tensor) -> float:
    """The share of the inputs' variance in the span of the rows; by chance R / D."""
    basis_DR = span(matrix_ED)
    centred_TD = x_TD.double() - x_TD.double().mean(0)
    return float((centred_TD @ basis_DR).square().sum() / centred_TD.square().sum().clamp(min=1e-300))
