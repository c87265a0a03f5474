"""How alike neighbouring experts are, measured where they are: on every layout the same pairs and tokens.

Legend: ``T`` tokens of a micro-batch on this rank, ``N`` tokens of the sample, ``D`` hidden size, ``E``
experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.model.parallel import expert_rank
from megatron_hyperrouter.ops.similarity import linear_cka
from megatron_hyperrouter.routers.base import Pass, Router, Routing

MOST_TOKENS, MOST_PAIRS = 256, 8


class Likeness:
    """Linear CKA of the outputs of experts 0 and 1, 2 and 3, ... of each layer, for the tokens of a pass that
    every data-parallel rank makes alike.

    It says nothing where an odd number of experts is on each rank: no rank has both of a pair.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        layers = config.model.num_layers + (config.model.mtp_num_layers or 0)
        self._sums_L2 = torch.zeros(layers, 2, dtype=torch.float64, device=device)  # CKA, pairs
        self._local = config.model.num_experts // config.parallel.expert_model_parallel_size

    @contextmanager
    def watching(self, routers: Iterable[Router]) -> Iterator[None]:
        """Inside, every pass of these routers is looked at."""
        with ExitStack() as stack:
            for router in routers:
                stack.enter_context(self._watched(router))
            yield

    def by_layer(self) -> dict[int, float]:
        """Layer number -> the mean over its pairs (collective)."""
        dist.all_reduce(self._sums_L2)
        rows = enumerate(self._sums_L2.tolist(), 1)
        return {layer: total / pairs for layer, (total, pairs) in rows if pairs}

    @contextmanager
    def _watched(self, router: Router) -> Iterator[None]:
        own = router.refine

        def refine(first: Routing, x_TD: Tensor, now: Pass) -> Routing:
            self._look(router, x_TD, now)
            return own(first, x_TD, now)

        router.refine = refine  # type: ignore[method-assign]
        try:
            yield
        finally:
            del router.refine

    @torch.no_grad()
    def _look(self, router: Router, x_TD: Tensor, now: Pass) -> None:
        if now.experts is None or self._local % 2:
            return
        outputs: list[Tensor] = []

        def keep(output: Tensor) -> Tensor:
            outputs.append(output.reshape(-1, output.size(-1)))
            return output.select(-1, 0)

        now.experts.scores_TE(_sample_ND(router, x_TD, now), keep)
        # Each expert computes the sample once for each rank that shares the experts, and all bring the same.
        each = outputs[:: len(outputs) // self._local]
        first = expert_rank() * self._local
        for number in range(0, 2 * MOST_PAIRS, 2):
            if first <= number < first + self._local:
                alike = linear_cka(each[number - first], each[number - first + 1])
                self._sums_L2[router.layer_number - 1] += torch.stack((alike, torch.ones_like(alike)))


def _sample_ND(router: Router, x_TD: Tensor, now: Pass) -> Tensor:
    """Evenly spaced tokens of the micro-batch, in the order of their places."""
    assert now.tokens is not None, "an engine tells the places of tokens"
    places_T = now.tokens.places_T
    if router.gather_shards is not None:
        x_TD, places_T = router.gather_shards(x_TD), router.gather_shards(places_T)
    rows_T = places_T.argsort()
    return x_TD[rows_T[:: -(-len(rows_T) // MOST_TOKENS)]]
