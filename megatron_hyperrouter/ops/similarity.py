"""Centred kernel alignment (CKA): how similar two representations of the same tokens are, from 0 to 1
(arXiv 1905.00414).

With Gram matrices K and L of the two and ``H = I - 1 1^T / N``: ``CKA = tr(KHLH) / sqrt(tr(KHKH)
tr(LHLH))``.

Legend: ``N`` tokens, ``D`` features (they may differ between the two).  All functions take leading batch
dimensions, ``[..., N, D]``, and ``valid_N``, boolean ``[..., N]``: rows where it is False are ignored.
They compute in float32 (float64 for float64 input), have gradients, and stay finite.  If CKA is 0 / 0, it
is 0, with finite gradients; this happens for one token, and for constant features.  Two tokens always have
CKA 1, so use more.
"""

from __future__ import annotations

import torch
from torch import Tensor

# a feature that varies by less than this part of its size is constant: the rest is rounding
_ROUNDING = 2.0**-20


def linear_cka(x_ND: Tensor, y_ND: Tensor, valid_N: Tensor | None = None) -> Tensor:
    """Linear CKA (centered kernel alignment): how similar two representations of the same tokens are.

    ``x_ND`` and ``y_ND`` have N tokens, and D features that may differ in number; both may have leading
    batch dimensions.  The result has the batch dimensions, and is from 0 to 1.  With the centered features
    Xc and Yc, it is ``||Yc^T Xc||^2 / (||Xc^T Xc|| ||Yc^T Yc||)`` in Frobenius norms.  It does not change
    if one representation is rotated, reflected or scaled as a whole, or if the tokens are permuted.

    Rows where ``valid_N`` is False are ignored.  For two tokens, CKA is always 1.  For one token or
    constant features, it is 0.
    """
    x_ND, y_ND = (_unit(_centred(each_ND, valid_N)) for each_ND in (x_ND, y_ND))
    if x_ND.size(-2) <= max(x_ND.size(-1), y_ND.size(-1)):  # the smaller of both forms
        return _cosine(x_ND @ x_ND.mT, y_ND @ y_ND.mT)
    cross, own_x, own_y = (_energy(a.mT @ b) for a, b in ((y_ND, x_ND), (x_ND, x_ND), (y_ND, y_ND)))
    return _ratio(cross, own_x, own_y)


def rbf_cka(x_ND: Tensor, y_ND: Tensor, sigma: float, valid_N: Tensor | None = None) -> Tensor:
    """CKA with the kernel ``K_ij = exp(-|x_i - x_j|^2 / (2 sigma^2))`` instead of the linear kernel.

    ``sigma > 0`` has the units of the features.  Otherwise, the arguments and the result are as for
    ``linear_cka``.  If the distances between tokens are much larger than sigma, CKA is close to 1 for any
    two representations, and has no gradient.  To avoid this, first divide each representation by its
    ``median_distance`` (in the same module).  Sigma is then relative to this distance, as in the paper on
    SimSMoE.
    """
    if not sigma > 0:
        raise ValueError(f"sigma = {sigma}: must be greater than 0")
    return _cosine(*(_centred_rbf(_centred(each_ND, valid_N), sigma, valid_N) for each_ND in (x_ND, y_ND)))


def median_distance(x_ND: Tensor, valid_N: Tensor | None = None) -> Tensor:
    """The (lower) median of the distances between two tokens, ``[...]``, without a gradient.

    If more than half of the distances are 0, their root mean square; if all are 0, 1.
    """
    with torch.no_grad():
        x_ND = _centred(x_ND, valid_N)
        off_NN = ~torch.eye(x_ND.size(-2), dtype=torch.bool, device=x_ND.device)
        pairs_NN = off_NN if valid_N is None else off_NN & valid_N.unsqueeze(-1) & valid_N.unsqueeze(-2)
        distances_NN = _squared_distances(x_ND).sqrt()
        flat = torch.where(pairs_NN, distances_NN, torch.nan).flatten(-2)
        if not flat.size(-1):
            return x_ND.new_ones(x_ND.shape[:-2])
        middle, mean_square = flat.nanmedian(-1).values, flat.square().nanmean(-1)
        # nan, the result without pairs, is not above the threshold
        size = torch.where(middle > 0, middle, mean_square.sqrt())
        return torch.where(size > 0, size, 1.0)


def _centred(x_ND: Tensor, valid_N: Tensor | None) -> Tensor:
    """Features minus their means; zeros if they are constant, and in ignored rows."""
    x_ND = x_ND if x_ND.dtype == torch.float64 else x_ND.float()
    if valid_N is None:
        there_N1 = x_ND.new_ones(x_ND.size(-2), 1, dtype=torch.bool)
    else:
        there_N1 = valid_N.unsqueeze(-1)
        x_ND = torch.where(there_N1, x_ND, 0.0)
    mean_1D = x_ND.sum(-2, keepdim=True) / there_N1.sum(-2, keepdim=True).clamp(min=1)
    rest_ND = torch.where(there_N1, x_ND - mean_1D, 0.0)
    varies_1D = _largest(rest_ND, (-2,)) > _ROUNDING * _largest(x_ND, (-2,))
    return torch.where(varies_1D, rest_ND, 0.0)


def _centred_rbf(x_ND: Tensor, sigma: float, valid_N: Tensor | None) -> Tensor:
    """``HKH``.  H removes a constant, so K - 1 can be used, which is more accurate if distances are far
    below sigma.
    """
    kernel_NN = torch.expm1(_squared_distances(x_ND) * (-0.5 / sigma**2))
    if valid_N is None:
        count_11: Tensor | int = max(x_ND.size(-2), 1)
    else:
        pairs_NN = valid_N.unsqueeze(-1) & valid_N.unsqueeze(-2)
        kernel_NN = torch.where(pairs_NN, kernel_NN, 0.0)
        count_11 = valid_N.sum(-1).clamp(min=1)[..., None, None]
    rows_N1 = kernel_NN.sum(-1, keepdim=True) / count_11
    centred_NN = kernel_NN - rows_N1 - rows_N1.mT + rows_N1.sum(-2, keepdim=True) / count_11
    return _unit(centred_NN if valid_N is None else torch.where(pairs_NN, centred_NN, 0.0))


def _squared_distances(x_ND: Tensor) -> Tensor:
    """From differences, because products cancel for tokens that are close.  The gradient at distance 0 is
    0.
    """
    return torch.cdist(x_ND, x_ND, compute_mode="donot_use_mm_for_euclid_dist").square()


def _unit(a_NM: Tensor) -> Tensor:
    """Scale the largest number to 1, so that fourth powers stay in range.  CKA and its gradient do not
    depend on the scale.
    """
    size_11 = _largest(a_NM, (-2, -1))
    return a_NM / torch.where(size_11 > 0, size_11, 1.0)


def _largest(a_NM: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The largest absolute value, without a gradient; 0 if there is none."""
    if not a_NM.numel():
        return a_NM.detach().sum(dims, keepdim=True)
    return a_NM.detach().abs().amax(dims, keepdim=True)


def _energy(a_NM: Tensor) -> Tensor:
    return a_NM.square().sum((-2, -1))


def _cosine(k_NN: Tensor, l_NN: Tensor) -> Tensor:
    return _ratio((k_NN * l_NN).sum((-2, -1)), _energy(k_NN), _energy(l_NN))


def _ratio(cross: Tensor, own_x: Tensor, own_y: Tensor) -> Tensor:
    """``cross / sqrt(own_x own_y)``, or 0; the condition before the root keeps the gradient of the unused
    branch finite.
    """
    defined = (own_x > 0) & (own_y > 0)
    roots = torch.where(defined, own_x, 1.0).rsqrt() * torch.where(defined, own_y, 1.0).rsqrt()
    return torch.where(defined, cross * roots, 0.0)
