"""model/parallel.py: the settings' layout reaches megatron-core's groups."""

from __future__ import annotations

import pytest
from megatron.core import parallel_state

from megatron_hyperrouter.config.tree import ParallelConfig, RunConfig
from megatron_hyperrouter.model.parallel import forget_groups, make_groups


@pytest.mark.parametrize(("chunks", "known_to_the_host"), [(None, None), (1, None), (2, 2)])
def test_one_chunk_is_no_interleaved_schedule(chunks, known_to_the_host, monkeypatch):
    """megatron-core takes any number for interleaving, 1 as well, and refuses it without pipeline stages."""
    asked = {}
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", lambda **sizes: asked.update(sizes))
    make_groups(RunConfig(parallel=ParallelConfig(virtual_pipeline_model_parallel_size=chunks)))
    assert asked["virtual_pipeline_model_parallel_size"] == known_to_the_host
    assert asked["expert_tensor_parallel_size"] == asked["tensor_model_parallel_size"] == 1


def test_groups_are_forgotten(monkeypatch):
    forgotten = []
    monkeypatch.setattr(parallel_state, "destroy_model_parallel", lambda: forgotten.append(True))
    forget_groups()
    assert forgotten == [True]
