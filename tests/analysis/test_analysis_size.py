"""Parameters and work of a model against sums by hand and the model in plain torch."""

from __future__ import annotations

import math

import pytest
from program.settings import TINY

from megatron_hyperrouter.analysis.size import size_of, trained_in_router
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.routers import ROUTERS

L, D, HEADS, CHANNELS, GROUPS, WIDTH, S, E, V = 2, 32, 4, 8, 2, 48, 16, 4, 264


def config_of(*flags: str):
    return parse([*TINY, "--data-path", "x", *flags], routers=ROUTERS)


def shapes_of(router: dict[str, tuple[int, ...]], *, untied: bool = False) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint of the tiny model."""
    found: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (V, D),
        "decoder.final_layernorm.weight": (D,),
    }
    if untied:
        found["output_layer.weight"] = (V, D)
    for layer in range(L):
        prefix = f"decoder.layers.{layer}."
        found |= {f"{prefix}{name}_layernorm.weight": (D,) for name in ("input", "pre_mlp")}
        found[prefix + "self_attention.linear_qkv.weight"] = ((HEADS + 2 * GROUPS) * CHANNELS, D)
        found[prefix + "self_attention.linear_proj.weight"] = (D, HEADS * CHANNELS)
        found |= {f"{prefix}mlp.router.{name}": shape for name, shape in router.items()}
        for expert in range(E):
            found[f"{prefix}mlp.experts.local_experts.{expert}.linear_fc1.weight"] = (2 * WIDTH, D)
            found[f"{prefix}mlp.experts.local_experts.{expert}.linear_fc2.weight"] = (D, WIDTH)
    return found


BACKBONE = L * (2 * D + 64 * D + D * D) + D  # norms and attention
EXPERT = 3 * WIDTH * D


@pytest.mark.parametrize("untied", [False, True])
def test_parameters_by_hand(untied):
    router = {"embedding_S": (D,), "frozen_seed": (1,), "frozen_hash": (32,)}  # what is frozen does not count
    size = size_of(config_of("--router.name", "hyper"), shapes_of(router, untied=untied))
    assert size.total == BACKBONE + V * D * (1 + untied) + L * (E * EXPERT + D)
    for k in range(1, E + 1):
        assert size.active(k) == BACKBONE + V * D + L * (k * EXPERT + D)


def test_frozen_matrix_is_no_parameter():
    shapes = shapes_of({"weight_ED": (E, D)})
    learned, frozen = (
        size_of(config_of("--router.name", "topk", *more), shapes) for more in ((), ("--router.freeze",))
    )
    assert learned.total - frozen.total == L * E * D


def test_flops_against_those_that_torch_counts():
    """torch's own counter on the matrix products of one sample, a triangle of the scores, times 3 for the
    backward pass.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    k = 2
    size = size_of(config_of("--router.name", "topk"), shapes_of({"weight_ED": (E, D)}))
    x_SD, heads = torch.zeros(S, D), HEADS * CHANNELS
    with FlopCounterMode(display=False) as counter:
        for _ in range(L):
            x_SD @ torch.zeros(D, heads + 2 * GROUPS * CHANNELS)
            x_SD @ torch.zeros(heads, D)
            x_SD @ torch.zeros(D, E)
            for _ in range(k):
                x_SD @ torch.zeros(D, 2 * WIDTH)
                torch.zeros(S, WIDTH) @ torch.zeros(WIDTH, D)
            for position in range(S):  # scores and sums over what a token sees
                for _ in range(2 * HEADS):
                    torch.zeros(1, CHANNELS) @ torch.zeros(CHANNELS, position + 1)
        x_SD @ torch.zeros(D, V)
    norms = (2 * L + 1) * D  # 6 FLOPs each and token, that the counter of matrix products does not see
    assert size.flops(k) * S == 3 * counter.get_total_flops() + 6 * norms * S


def test_flops_of_a_training_whose_batch_and_k_grow():
    size = size_of(config_of("--router.name", "topk"), shapes_of({"weight_ED": (E, D)}))
    steps = [{"topk": k, "consumed_tokens": tokens} for k, tokens in ((1, 8), (1, 24), (2, 64))]
    steps.insert(1, {"consumed_tokens": 16})  # skipped
    assert size.training_flops(steps) == 16 * size.flops(1) + 40 * size.flops(2)
    assert size.training_flops([]) == 0


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_trained_names_are_those_of_a_real_router(name):
    from megatron_hyperrouter.routers.base import RunFacts

    config = config_of("--router.name", name)
    facts = RunFacts(num_layers=L, train_iters=12, vocab_size=V)
    sizes = {
        "hidden_size": D,
        "num_experts": E,
        "topk": 2,
        "layer_number": 1,
        "seed": 1,
        "aux_loss_coeff": 0.0,
        "z_loss_coeff": 0.0,
    }
    router = ROUTERS[name](config.router.options, **sizes, facts=facts)
    trained = {each for each, parameter in router.named_parameters() if parameter.requires_grad}
    assert trained_in_router(config) == trained
    assert all(math.prod(tensor.shape) for tensor in router.state_dict().values())
