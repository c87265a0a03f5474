"""shapes.py against the tensors of the engine that builds the model; memory.py against sums by hand."""

from __future__ import annotations

import pytest
import torch
from one_rank import world
from program.settings import TINY

from megatron_hyperrouter.analysis.memory import state_bytes
from megatron_hyperrouter.analysis.shapes import shapes_of
from megatron_hyperrouter.analysis.size import ModelSize
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.engines.clock import Clock
from megatron_hyperrouter.engines.deepspeed.model import build, named_parameters
from megatron_hyperrouter.engines.statistics import RouterStatistics
from megatron_hyperrouter.model.loss import LanguageModelLoss
from megatron_hyperrouter.model.names import matrices
from megatron_hyperrouter.routers import ROUTERS


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    with world(tmp_path_factory.mktemp("world")):
        yield


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--router.name topk --router.bias --untie-embeddings-and-output-weights --qk-layernorm",
        "--mlp-type residual --num-query-groups 1",
        "--moe-layer-freq [0,1] --ffn-hidden-size 40 --moe-shared-expert-intermediate-size 24"
        " --moe-shared-expert-gate",
        "--router.name competesmoe --kv-channels 6",
        "--add-qkv-bias --window-size 4,0",
        "--multi-latent-attention --num-query-groups 4 --q-lora-rank 12 --kv-lora-rank 8 --qk-head-dim 8"
        " --qk-pos-emb-head-dim 4 --v-head-dim 6 --qk-layernorm",
        "--multi-latent-attention --num-query-groups 4 --kv-lora-rank 8",
    ],
)
def test_settings_alone_give_the_tensors_that_the_engine_makes(flags, one_rank):
    config = parse([*TINY, "--data-path", "x", *flags.split()], routers=ROUTERS)
    statistics = RouterStatistics(config.model.num_layers, config.model.num_experts)
    loss = LanguageModelLoss(torch.device("cpu"))
    model = build(config, vocab_size=257, clock=Clock(), statistics=statistics, loss=loss)
    trained = [(name, each) for name, each in named_parameters(model, config) if each.requires_grad]
    built = {name: tuple(each.shape) for name, each in matrices(trained)}  # single experts
    assert shapes_of(config, built["embedding.word_embeddings.weight"][0]) == built


def test_state_of_a_rank_by_hand():
    size = ModelSize(lookup=1000, experts=8000, others=3000, num_experts=4, attention=0)

    def of(world_size, *flags):
        config = parse([*TINY, "--data-path", "x", *flags], routers=ROUTERS, world_size=world_size)
        return state_bytes(config, size, world_size)

    assert of(1, "--zero-stage", "0") == 12000 * 16
    assert of(4, "--zero-stage", "1") == 12000 * 8 + 12000 * 8 / 4
    assert of(4, "--zero-stage", "2") == 12000 * 4 + 12000 * 12 / 4
    split = ["--expert-model-parallel-size", "4", "--bf16"]
    assert of(4, *split) == 4000 * (6 + 12 / 4) + 2000 * (6 + 12)
    megatron = ["--engine", "megatron", "--tensor-model-parallel-size", "2", "--sequence-parallel"]
    assert of(2, *megatron) == 12000 / 2 * 16
