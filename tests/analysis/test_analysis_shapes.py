"""shapes.py against the tensors of the engine that builds the model."""

from __future__ import annotations

import pytest
import torch
from one_rank import world
from program.settings import TINY

from megatron_hyperrouter.analysis.shapes import shapes_of
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
