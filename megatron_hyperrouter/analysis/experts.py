"""How alike the experts of a trained model are.

Legend: ``T`` tokens, ``D`` hidden size, ``E`` experts of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from megatron_hyperrouter.ops.similarity import linear_cka
from megatron_hyperrouter.routers.base import Pass, Router, Routing

MOST_TOKENS = 1024  # compared of a micro-batch: beyond, CKA hardly moves


@contextmanager
def open_to_routers(kind: type[Router]) -> Iterator[None]:
    """Engines that are built inside serve the experts to routers of this class, whether the method needs them
    or not.
    """
    before = kind.needs_experts
    kind.needs_experts = True
    try:
        yield
    finally:
        kind.needs_experts = before


def expert_similarity(routers: Iterable[Router], evaluate: Callable[[], object]) -> dict[int, float]:
    """Layer number -> :func:`mean_similarity` of its experts on the tokens that ``evaluate()`` brings, mean
    over its micro-batches.

    All experts have to be on this one rank, and the engine built inside :func:`open_to_routers`.  The routing
    stays as it is.
    """
    found: dict[int, list[float]] = {router.layer_number: [] for router in routers}
    with ExitStack() as stack:
        for router in routers:
            stack.enter_context(_looking(router, found[router.layer_number]))
        evaluate()
    return {layer: sum(values) / len(values) for layer, values in sorted(found.items())}


def mean_similarity(outputs_ETD: Tensor) -> float:
    """Linear CKA of two experts' outputs for the same tokens, mean over the E (E - 1) / 2 pairs: 0 unrelated,
    1 alike; 0 for E = 1.
    """
    num_experts = outputs_ETD.size(0)
    rows = [
        linear_cka(outputs_ETD[i].expand_as(outputs_ETD[i + 1 :]), outputs_ETD[i + 1 :])
        for i in range(num_experts - 1)
    ]
    return float(torch.cat(rows).mean()) if rows else 0.0


@contextmanager
def _looking(router: Router, found: list[float]) -> Iterator[None]:
    """Inside, each pass of ``router`` also has every expert compute every token."""

    def look(first: Routing, x_TD: Tensor, now: Pass) -> Routing:
        if now.experts is None:
            raise RuntimeError("the engine does not serve its experts: build it inside open_to_routers()")
        outputs: list[Tensor] = []

        def keep(output: Tensor) -> Tensor:
            outputs.append(output.reshape(-1, output.size(-1)))
            return output.select(-1, 0)

        step = -(-x_TD.size(0) // MOST_TOKENS)
        now.experts.scores_TE(x_TD[::step], keep)
        if len(outputs) != router.num_experts:
            raise RuntimeError(
                f"{len(outputs)} of {router.num_experts} experts are on this rank: run in one process"
            )
        found.append(mean_similarity(torch.stack(outputs)))
        return first

    router.refine = look  # type: ignore[method-assign]
    try:
        yield
    finally:
        del router.refine
