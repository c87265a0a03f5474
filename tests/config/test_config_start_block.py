"""What the summary at the start of a run says of its engine."""

from __future__ import annotations

import pytest

from megatron_hyperrouter.analysis.size import ModelSize
from megatron_hyperrouter.commands.training.start_block import start_block
from megatron_hyperrouter.config.cli import replace_leaves
from megatron_hyperrouter.config.tree import RunConfig

MEGATRON = {"engine": "megatron", "use_distributed_optimizer": True}


@pytest.mark.parametrize(
    ("settings", "world_size", "line"),
    [
        ({}, 1, "deepspeed, ZeRO stage 0, float32"),  # one process has nothing to share out
        ({}, 2, "deepspeed, ZeRO stage 1, float32"),
        ({"bf16": True}, 1, "deepspeed, ZeRO stage 1, bfloat16"),  # its float32 copies are ZeRO's
        ({"engine": "megatron"}, 2, "megatron, float32"),
        (MEGATRON, 2, "megatron, distributed optimizer, float32"),
    ],
)
def test_the_engine_as_it_runs(settings: dict[str, object], world_size: int, line: str) -> None:
    config = replace_leaves(RunConfig(), **settings)
    size = ModelSize(lookup=0, experts=8, others=1, num_experts=8, attention=0)
    rows = dict(start_block(config, size, world_size=world_size, epoch=None))
    assert rows["engine"] == line
