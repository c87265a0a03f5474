"""Global names: what is an expert's, what is a router's, what decays."""

from __future__ import annotations

import pytest
import torch

from megatron_hyperrouter.model.names import decays, is_expert, router_parameter

EXPERT = "decoder.layers.3.mlp.experts.local_experts.12.linear_fc1.weight"
ROUTER = "decoder.layers.11.mlp.router.embedding_S"
DENSE = "decoder.layers.0.self_attention.linear_qkv.weight"


RESIDUAL = "decoder.layers.0.mlp.residual.linear_fc1.weight"


@pytest.mark.parametrize(
    ("name", "expert", "router"),
    [
        (EXPERT, True, None),
        (ROUTER, False, (11, "embedding_S")),
        (DENSE, False, None),
        (RESIDUAL, False, None),
    ],
)
def test_kinds(name: str, expert: bool, router: tuple[int, str] | None) -> None:
    assert is_expert(name) == expert
    assert router_parameter(name) == router


@pytest.mark.parametrize(("shape", "answer"), [((8, 4), True), ((8,), False), ((), False)])
def test_only_matrices_decay(shape: tuple[int, ...], answer: bool) -> None:
    assert decays(DENSE, torch.zeros(shape)) == answer
