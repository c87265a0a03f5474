"""Router weights from an embedding: HyperRouter's generator (arXiv 2312.07035) and its vector-Jacobian
product.

Legend: ``S`` size of an embedding, ``D`` hidden size, ``E`` experts, ``H`` hypernetwork width, ``P``
generated numbers: E*(D+1), row-major [E, D+1] with the bias in the last column, or E*D without a bias.

``embedding`` is ``_S``, one for all experts, or ``_ES``, one for each expert.  In the second case, the
numbers of an expert come from its own embedding, through the same two layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    """Generate a router ``(W_ED, b_E)`` from an embedding e: ``W2 relu(W1 e + b1) + b2``, reshaped to E rows.

    The hypernetwork has H hidden units and P outputs.  With ``bias=True``, P = E (D + 1), and the last
    number of each row is in b_E.  With ``bias=False``, P = E D, and b_E is None.  The embedding may have
    any size, not only D.  If its shape is ``_ES``, each expert's row comes from the expert's own embedding.
    Gradients flow to all inputs.  Raises ValueError if P does not fit ``num_experts``.
    """
    if w2_PH.size(0) % num_experts or w2_PH.size(0) <= num_experts * bias:
        raise ValueError(
            f"w2_PH has {w2_PH.size(0)} rows; the number of rows must be num_experts = {num_experts} times "
            f"{'(hidden size + 1)' if bias else 'the hidden size'}"
        )
    if embedding_D.dim() == 1:
        hidden_H = torch.addmv(b1_H, w1_HD, embedding_D).relu()
        rows = torch.addmv(b2_P, w2_PH, hidden_H).view(num_experts, -1)
    else:
        hidden_EH = F.linear(embedding_D, w1_HD, b1_H).relu()
        rows = (
            b2_P.view(num_experts, -1)
            + torch.bmm(_by_expert(w2_PH, num_experts), hidden_EH[..., None])[..., 0]
        )
    return (rows[:, :-1].contiguous(), rows[:, -1].contiguous()) if bias else (rows, None)


def active_units(embedding: Tensor, w1_HS: Tensor, b1_H: Tensor) -> Tensor:
    """The hidden units that the ReLU does not set to zero, bool ``_H`` or ``_EH``: all that
    :func:`transposed` needs from the embedding.
    """
    if embedding.dim() == 1:
        return torch.addmv(b1_H, w1_HS, embedding) > 0
    return F.linear(embedding, w1_HS, b1_H) > 0


def transposed(
    grad_W_ED: Tensor, grad_b_E: Tensor | None, active: Tensor, w1_HS: Tensor, w2_PH: Tensor
) -> Tensor:
    """Gradient of the embedding from that of ``(W_ED, b_E)``: ``W1^T (active * (W2^T vec[dW | db]))``.

    ``grad_b_E`` is None if :func:`generate` had ``bias=False``.  The frozen weights get no gradient.
    """
    grad_EP = grad_W_ED if grad_b_E is None else torch.cat((grad_W_ED, grad_b_E.unsqueeze(1)), 1)
    if active.dim() == 1:
        grad_H = torch.mv(w2_PH.t(), grad_EP.reshape(-1))
        return torch.mv(w1_HS.t(), grad_H.masked_fill(~active, 0.0))
    grad_EH = torch.bmm(grad_EP[:, None], _by_expert(w2_PH, grad_EP.size(0)))[:, 0]
    return grad_EH.masked_fill(~active, 0.0) @ w1_HS


def _by_expert(w2_PH: Tensor, num_experts: int) -> Tensor:
    """The second layer as one matrix for each expert, in the same memory."""
    return w2_PH.view(num_experts, -1, w2_PH.size(1))
