"""What the summary at the start of a run says of its engine, its layout and its sizes."""

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
        (MEGATRON, 1, "megatron, distributed optimizer, float32"),
        (MEGATRON, 2, "megatron, distributed optimizer, overlapped communication, float32"),
    ],
)
def test_the_engine_as_it_runs(settings: dict[str, object], world_size: int, line: str) -> None:
    assert rows_of(settings, world_size)["engine"] == line


@pytest.mark.parametrize(
    ("settings", "world_size", "row", "line"),
    [
        ({"num_layers": 4}, 1, "router", "hyper, 8 experts in each of 4 layers, k = 2"),
        (
            {"num_layers": 4, "moe_layer_freq": "[0,1,1,1]"},
            1,
            "router",
            "hyper, 8 experts in each of 3 of the 4 layers, k = 2",
        ),
        ({}, 1, "layout", "1 rank"),
        (
            {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "engine": "megatron"},
            8,
            "layout",
            "8 ranks; parallel sizes: data 4, tensor 2, expert 2",
        ),
        (
            {"micro_batch_size": 4, "global_batch_size": 16, "seq_length": 128},
            2,
            "step",
            "2,048 tokens: 16 samples of 128 tokens; 2 micro-batches of 4 per rank",
        ),
        (
            {"micro_batch_size": 4, "global_batch_size": 8, "seq_length": 128},
            2,
            "step",
            "1,024 tokens: 8 samples of 128 tokens; 1 micro-batch of 4 per rank",
        ),
    ],
)
def test_the_sizes(settings: dict[str, object], world_size: int, row: str, line: str) -> None:
    assert rows_of(settings, world_size)[row] == line


def rows_of(settings: dict[str, object], world_size: int) -> dict[str, str]:
    config = replace_leaves(RunConfig(), **settings)
    size = ModelSize(lookup=0, experts=8, others=1, num_experts=8, attention=0)
    return dict(start_block(config, size, world_size=world_size, epoch=None))
