"""Initial weights: which standard deviation, and that (seed, global name) decides every number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from megatron_hyperrouter.config.tree import ModelConfig
from megatron_hyperrouter.engines.routing import draw_by_name
from megatron_hyperrouter.model.init import initial_std, initialise
from megatron_hyperrouter.ops import keyed

MODEL = ModelConfig(num_layers=8, init_method_std=0.05)
LAYER = "decoder.layers.2."
SHAPES = {
    "embedding.word_embeddings.weight": (60, 40),
    f"{LAYER}input_layernorm.weight": (40,),
    f"{LAYER}self_attention.linear_qkv.weight": (80, 40),
    f"{LAYER}self_attention.linear_proj.weight": (40, 40),
    f"{LAYER}self_attention.q_layernorm.weight": (10,),
    f"{LAYER}mlp.experts.local_experts.5.linear_fc1.weight": (64, 40),
    f"{LAYER}mlp.experts.local_experts.5.linear_fc2.weight": (40, 32),
    f"{LAYER}mlp.router.embedding_S": (40,),
    "decoder.final_layernorm.weight": (40,),
    "output_layer.weight": (60, 40),
}
INTO_THE_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")


def initial(names: list[str], seed: int = 1) -> dict[str, Tensor]:
    parameters = {name: nn.Parameter(torch.full(SHAPES[name], 7.0)) for name in names}
    initialise(parameters.items(), MODEL, draw_by_name(seed))
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.usefixtures("groups")
class TestInitialise:
    def test_kinds_of_weights(self) -> None:
        for name, tensor in initial(list(SHAPES)).items():
            if "layernorm" in name:
                assert torch.equal(tensor, torch.ones_like(tensor))
            elif "router" in name:
                assert torch.equal(tensor, torch.full_like(tensor, 7.0))  # fills itself
            else:
                std = 0.05 / math.sqrt(2 * 8) if name.endswith(INTO_THE_RESIDUAL) else 0.05
                # of 1280 numbers and more: 3 sigma
                assert tensor.std().item() == pytest.approx(std, rel=0.06)
                assert abs(tensor.mean().item()) < 4 * std / math.sqrt(tensor.numel())

    def test_a_weight_depends_on_its_name_and_the_seed_alone(self) -> None:
        """A rank that holds other weights, in another order, has the same ones."""
        whole = initial(list(SHAPES))
        part = list(SHAPES)[::-2]
        for name, tensor in initial(part).items():
            assert torch.equal(tensor, whole[name])
        matrices = [name for name, shape in SHAPES.items() if len(shape) == 2]
        flat = [whole[name].flatten()[:100] / whole[name].std() for name in matrices]
        assert all(not torch.allclose(a, b, atol=0.1) for i, a in enumerate(flat) for b in flat[:i])
        other = initial(matrices, seed=2)
        assert all(not torch.equal(other[name], whole[name]) for name in matrices)

    def test_numbers_are_those_of_the_keyed_stream(self) -> None:
        """So they are the same with any device, library version and layout."""
        name = f"{LAYER}mlp.experts.local_experts.5.linear_fc2.weight"
        expected = keyed.normal(SHAPES[name], seed=1, name=name) * initial_std(name, MODEL)
        assert torch.equal(initial([name])[name], expected)
        assert initial_std(name, MODEL) == 0.05 / 4
