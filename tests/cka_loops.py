"""Centred kernel alignment in plain-Python loops, in float64: the formula with the centring matrix H, written
out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Matrix = list[list[float]]
Kernel = Callable[[list[float], list[float]], float]


def linear_kernel(a: list[float], b: list[float]) -> float:
    return math.fsum(u * v for u, v in zip(a, b, strict=True))


def rbf_kernel(sigma: float) -> Kernel:
    return lambda a, b: math.exp(-math.fsum((u - v) ** 2 for u, v in zip(a, b, strict=True)) / (2 * sigma**2))


def cka(x: Matrix, y: Matrix, kernel: Kernel, kernel_of_y: Kernel | None = None) -> float:
    """tr(KHLH) / sqrt(tr(KHKH) tr(LHLH)), written out."""
    n = len(x)
    H = [[(i == j) - 1 / n for j in range(n)] for i in range(n)]
    K, L = ([[k(a, b) for b in rows] for a in rows] for rows, k in ((x, kernel), (y, kernel_of_y or kernel)))

    def product(a: Matrix, b: Matrix) -> Matrix:
        return [[math.fsum(a[i][m] * b[m][j] for m in range(n)) for j in range(n)] for i in range(n)]

    def hsic(a: Matrix, b: Matrix) -> float:
        whole = product(product(a, H), product(b, H))
        return math.fsum(whole[i][i] for i in range(n))

    return hsic(K, L) / math.sqrt(hsic(K, K) * hsic(L, L))
