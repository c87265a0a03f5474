"""Router weights from an embedding: HyperRouter's generator (arXiv 2312.07035) and its vector-Jacobian
product.

Legend: ``D`` hidden size (also the embedding's size, unless that is set), ``E`` experts, ``H`` hypernetwork
width, ``P`` generated numbers: E*(D+1), row-major [E, D+1] with the bias in the last column, or E*D without a
bias.
"""

from __future__ import annotations

import torch
from torch import Tensor


def generate(
    embedding_D: Tensor,
    w1_HD: Tensor,
    b1_H: Tensor,
    w2_PH: Tensor,
    b2_P: Tensor,
    num_experts: int,
    *,
    bias: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The router ``(W_ED, b_E)`` out of ``W2 relu(W1 e + b1) + b2``; b_E is None with ``bias=False``, where P
    = E*D.

    Differentiable; W_ED is contiguous.  Raises ValueError where P does not divide into ``num_experts`` rows.
    """
    if w2_PH.size(0) % num_experts or w2_PH.size(0) <= num_experts * bias:
        raise ValueError(f"P = {w2_PH.size(0)} rows in w2_PH do not make {num_experts} experts' weights")
    hidden_H = torch.addmv(b1_H, w1_HD, embedding_D).relu()
    rows = torch.addmv(b2_P, w2_PH, hidden_H).view(num_experts, -1)
    return (rows[:, :-1].contiguous(), rows[:, -1].contiguous()) if bias else (rows, None)


def active_units(embedding_D: Tensor, w1_HD: Tensor, b1_H: Tensor) -> Tensor:
    """Which hidden units the ReLU lets through, bool ``_H``: all that :func:`transposed` has to know of the
    embedding.
    """
    return torch.addmv(b1_H, w1_HD, embedding_D) > 0


def transposed(
    grad_W_ED: Tensor, grad_b_E: Tensor | None, active_H: Tensor, w1_HD: Tensor, w2_PH: Tensor
) -> Tensor:
    """Gradient of the embedding from that of ``(W_ED, b_E)``: ``W1^T (active * (W2^T vec[dW | db]))``.

    ``grad_b_E`` is None where :func:`generate` had ``bias=False``.  The frozen weights get no gradient.
    """
    grad_EP = grad_W_ED if grad_b_E is None else torch.cat((grad_W_ED, grad_b_E.unsqueeze(1)), 1)
    grad_H = torch.mv(w2_PH.t(), grad_EP.reshape(-1))
    return torch.mv(w1_HD.t(), grad_H.masked_fill(~active_H, 0.0))
