"""Global names: what is an expert's, what is a router's, what decays."""

from __future__ import annotations

import pytest
import torch

from megatron_hyperrouter.model.names import decays, is_expert, matrices, router_parameter, stacked_name

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


def test_a_stacked_parameter_is_a_matrix_of_each_expert() -> None:
    name = stacked_name("decoder.layers.3.mlp.experts.linear_fc1_LGD", first=4, count=2)
    stack = torch.arange(12.0).view(2, 3, 2)
    dense = torch.zeros(3)
    found = dict(matrices([(name, stack), (DENSE, dense)]))
    prefix = "decoder.layers.3.mlp.experts.local_experts."
    assert list(found) == [f"{prefix}4.linear_fc1.weight", f"{prefix}5.linear_fc1.weight", DENSE]
    assert torch.equal(found[f"{prefix}5.linear_fc1.weight"], stack[1]) and found[DENSE] is dense
    found[f"{prefix}4.linear_fc1.weight"].fill_(-1.0)  # what is copied there is in the parameter
    assert stack[0].eq(-1.0).all() and not stack[1].eq(-1.0).any()
    assert is_expert(name) and stacked_name(DENSE, first=4, count=2) == DENSE
