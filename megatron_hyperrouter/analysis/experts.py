"""How similar the experts of a trained model are.

Legend: ``T`` tokens, ``D`` hidden size, ``E`` experts of the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_hyperrouter.analysis.watching import watching
from megatron_hyperrouter.ops.similarity import linear_cka
from megatron_hyperrouter.routers.base import Pass, Router, Routing

_LARGEST = 1 << 27  # numbers in a temporary tensor
MOST_TOKENS = 1024  # tokens of a micro-batch to compare: more of them hardly change CKA


@contextmanager
def open_to_routers(kind: type[Router]) -> Iterator[None]:
    """Within this context, engines give the experts to routers of this class, even if the method does not
    need them.
    """
    before = kind.needs_experts
    kind.needs_experts = True
    try:
        yield
    finally:
        kind.needs_experts = before


def expert_similarity(routers: Iterable[Router], evaluate: Callable[[], object]) -> dict[int, float]:
    """Layer number -> :func:`mean_similarity` of its experts, averaged over the micro-batches of
    ``evaluate()``.

    All experts must be on this rank, and the engine must have been built inside :func:`open_to_routers`.
    The routing does not change.
    """
    routers = list(routers)
    found: dict[int, list[float]] = {router.layer_number: [] for router in routers}

    def see(router: Router, routing: Routing, x_TD: Tensor, now: Pass) -> None:
        found[router.layer_number].append(mean_similarity(every_output_ETD(router, x_TD, now)))

    with watching(routers, see):
        evaluate()
    return {layer: sum(values) / len(values) for layer, values in sorted(found.items())}


def mean_similarity(outputs_ETD: Tensor) -> float:
    """Linear CKA of two experts' outputs for the same tokens, averaged over the E (E - 1) / 2 pairs: 0 for
    unrelated experts, 1 for equal ones; 0 for E = 1.
    """
    num_experts = outputs_ETD.size(0)
    rows = [
        linear_cka(outputs_ETD[i].expand_as(outputs_ETD[i + 1 :]), outputs_ETD[i + 1 :])
        for i in range(num_experts - 1)
    ]
    return float(torch.cat(rows).mean()) if rows else 0.0


def similarity_matrix(outputs_END: Tensor) -> Tensor:
    """Linear CKA of each pair of experts, ``_EE``, symmetric; 0 in the rows of an expert with constant
    output.
    """
    outputs_END = outputs_END.float()
    centred_END = outputs_END - outputs_END.mean(1, keepdim=True)
    # As in ops.similarity: what is left of a constant feature is rounding, and fourth powers stay in range.
    # NaN is not constant: it must be seen in the result.
    rounding_E1D = 2.0**-20 * outputs_END.abs().amax(1, keepdim=True)
    centred_END = torch.where(centred_END.abs().amax(1, keepdim=True) <= rounding_E1D, 0.0, centred_END)
    largest_E11 = centred_END.abs().amax((1, 2), keepdim=True)
    centred_END = centred_END / torch.where(largest_E11 > 0, largest_E11, 1.0)
    kernels_ENN = centred_END @ centred_END.mT
    flat_EM = kernels_ENN.flatten(1)
    sizes_E1 = flat_EM.norm(dim=1, keepdim=True)
    unit_EM = flat_EM / torch.where(sizes_E1 > 0, sizes_E1, 1.0)
    return (unit_EM @ unit_EM.T).clamp(0.0, 1.0)


def comparable_tokens(num_experts: int, hidden_size: int) -> int:
    """Number of tokens for :func:`similarity_matrix`: four for each feature, because with fewer, experts
    look alike; fewer if memory is too small.
    """
    return min(4 * hidden_size, math.isqrt(_LARGEST // num_experts), _LARGEST // (num_experts * hidden_size))


def every_output_ETD(router: Router, x_TD: Tensor, now: Pass) -> Tensor:
    """Every expert's output for some of the tokens, computed by the engine."""
    if now.experts is None:
        raise RuntimeError(
            "this engine gives no access to its experts; build the engine inside open_to_routers()"
        )
    outputs: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        outputs.append(output.reshape(-1, output.size(-1)))
        return output.select(-1, 0)

    step = -(-x_TD.size(0) // MOST_TOKENS)
    now.experts.scores_TE(x_TD[::step], keep)
    if len(outputs) != router.num_experts:
        raise RuntimeError(
            f"this rank has only {len(outputs)} of the {router.num_experts} experts; run in a single process"
        )
    return torch.stack(outputs)
