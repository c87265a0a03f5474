"""What both engines share: an evaluation, however long, keeps a few of its micro-batches at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_hyperrouter.engines.base import RankPlace
from megatron_hyperrouter.engines.clock import Clock
from megatron_hyperrouter.engines.shared import SharedEngine


@pytest.mark.parametrize(("stages", "count"), [(1, 0), (1, 1), (1, 16), (1, 50), (2, 50)])
def test_an_evaluation_forgets_what_it_has_seen(stages: int, count: int) -> None:
    place = RankPlace(rank=0, world_size=1, data_rank=0, data_size=1)
    engine = SimpleNamespace(
        clock=Clock(), config=SimpleNamespace(parallel=SimpleNamespace(pipeline_model_parallel_size=stages))
    )
    engine.clock.begin(step=7, topk=3)
    batches = [(torch.full((1, 4), number), torch.zeros(1, 4)) for number in range(count)]
    seen, turns = [], set()
    for part in SharedEngine.in_parts(engine, iter(batches)):  # type: ignore[arg-type]
        for tokens_BS, _ in part:
            engine.clock.arrive(tokens_BS, place)
        assert len(engine.clock.arrived) == len(part) <= 16 * stages
        assert (engine.clock.step, engine.clock.topk) == (7, 3)
        turns.add(engine.clock.turn)  # with each part layers count their passes anew
        seen += [int(tokens.ids_T[0]) for tokens in engine.clock.arrived if tokens is not None]
    assert seen == list(range(count))
    assert len(turns) == -(-count // (16 * stages))
