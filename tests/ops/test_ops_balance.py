"""Balance losses and numbers, against plain-Python loops in float64 and megatron-core."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_hyperrouter.ops.balance import (
    bias_step,
    entropy,
    known_load_loss,
    load,
    sequence_loss,
    switch_loss,
    z_loss,
)
from megatron_hyperrouter.ops.topk import topk_softmax


def random_routing(num_tokens: int, num_experts: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits_TE = 2 * torch.randn(
        num_tokens, num_experts, generator=torch.Generator().manual_seed(num_tokens + k)
    )
    return logits_TE, topk_softmax(logits_TE, k)[1]


def aux_loop(probs: list[list[float]], experts: list[list[int]]) -> float:
    num_experts, topk = len(probs[0]), len(experts[0])
    total = 0.0
    for expert in range(num_experts):
        share = sum(row.count(expert) for row in experts) / (len(experts) * topk)
        total += num_experts * share * sum(row[expert] for row in probs) / len(probs)
    return total


@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), [(1, 4, 1), (17, 4, 2), (30, 9, 9)])
def test_switch_loss_against_loops(num_tokens, num_experts, k):
    logits_TE, experts_TK = random_routing(num_tokens, num_experts, k)
    expected = aux_loop(logits_TE.softmax(-1).double().tolist(), experts_TK.tolist())
    assert float(switch_loss(logits_TE.softmax(-1), experts_TK)) == pytest.approx(expected, rel=1e-6)


def test_switch_loss_is_one_when_uniform_and_E_when_collapsed():
    every_TK = torch.arange(8).view(4, 2)
    assert float(switch_loss(torch.full((4, 8), 1 / 8), every_TK)) == pytest.approx(1.0)
    one_TE = torch.zeros(4, 8).index_fill(1, torch.tensor([3]), 1.0)
    assert float(switch_loss(one_TE, torch.full((4, 1), 3))) == pytest.approx(8.0)


def test_switch_loss_gradient_is_E_times_share_over_T():
    logits_TE, experts_TK = random_routing(10, 5, 2)
    probs_TE = logits_TE.softmax(-1).requires_grad_()
    (gradient_TE,) = torch.autograd.grad(switch_loss(probs_TE, experts_TK), probs_TE)
    share = [sum(row.count(expert) for row in experts_TK.tolist()) / 20 for expert in range(5)]
    torch.testing.assert_close(gradient_TE, torch.tensor([[5 * value / 10 for value in share]] * 10))


def test_megatron_core_has_the_same_balance_loss():
    moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    logits_TE, experts_TK = random_routing(24, 8, 3)
    theirs = moe_utils.switch_load_balancing_loss_func(
        logits_TE.softmax(-1), load(experts_TK, 8), 24, 3, 8, 1.0
    )
    assert float(switch_loss(logits_TE.softmax(-1), experts_TK)) == pytest.approx(float(theirs), rel=1e-6)


def test_no_tokens_cost_nothing():
    assert float(switch_loss(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64))) == 0.0


def test_z_loss_and_entropy_against_loops():
    logits_TE, _ = random_routing(13, 6, 1)
    squares, entropies = [], []
    for row in logits_TE.double().tolist():
        total = math.fsum(math.exp(value) for value in row)
        squares.append(math.log(total) ** 2)
        entropies.append(-math.fsum(math.exp(value) / total * (value - math.log(total)) for value in row))
    assert float(z_loss(logits_TE)) == pytest.approx(sum(squares) / 13, rel=1e-5)
    assert float(entropy(logits_TE)) == pytest.approx(sum(entropies) / 13, rel=1e-5)


def test_z_loss_gradient_is_that_of_its_formula():
    logits_TE, _ = random_routing(13, 6, 1)
    double_TE, logits_TE = logits_TE.double().requires_grad_(), logits_TE.requires_grad_()
    (expected_TE,) = torch.autograd.grad(3 * double_TE.exp().sum(1).log().pow(2).mean(), double_TE)
    (gradient_TE,) = torch.autograd.grad(3 * z_loss(logits_TE), logits_TE)
    torch.testing.assert_close(gradient_TE.double(), expected_TE, rtol=1e-5, atol=1e-7)


def test_entropy_is_ln_E_when_uniform_and_zero_when_certain():
    assert float(entropy(torch.zeros(3, 16))) == pytest.approx(math.log(16))
    certain_TE = torch.full((3, 4), -math.inf).index_fill(1, torch.tensor([2]), 0.0)
    assert float(entropy(certain_TE)) == 0.0


def test_load_counts_routes_of_experts_nobody_chose_too():
    _, experts_TK = random_routing(11, 7, 3)
    flat = experts_TK.flatten().tolist()
    assert load(experts_TK, 9).tolist() == [flat.count(expert) for expert in range(9)]
    assert load(experts_TK, 9).dtype == torch.int64


def test_sequence_loss_is_the_mean_of_each_sequence_by_itself():
    logits_TE, experts_TK = random_routing(24, 6, 2)
    sequence_T = torch.tensor([2, 0, 2, 1] * 6)  # 12, 6 and 6 tokens, interleaved
    probs, experts = logits_TE.softmax(-1).double().tolist(), experts_TK.tolist()
    expected = 0.0
    for name in range(3):
        rows = [t for t, own in enumerate(sequence_T.tolist()) if own == name]
        expected += aux_loop([probs[t] for t in rows], [experts[t] for t in rows]) / 3
    whole = sequence_loss(logits_TE.softmax(-1), experts_TK, sequence_T, 3)
    assert float(whole) == pytest.approx(expected, rel=1e-6)
    assert float(whole) != pytest.approx(float(switch_loss(logits_TE.softmax(-1), experts_TK)), rel=1e-3)
    one = sequence_loss(logits_TE.softmax(-1), experts_TK, torch.zeros(24, dtype=torch.int64), 1)
    assert float(one) == pytest.approx(float(switch_loss(logits_TE.softmax(-1), experts_TK)), rel=1e-6)


def test_known_load_loss_against_a_loop_and_one_when_uniform():
    logits_TE, _ = random_routing(15, 6, 2)
    share = [0.5, 0.25, 0.125, 0.125, 0.0, 0.0]
    probs = logits_TE.softmax(-1).double().tolist()
    expected = 6 * sum(share[e] * sum(row[e] for row in probs) / 15 for e in range(6))
    assert float(known_load_loss(logits_TE.softmax(-1), torch.tensor(share))) == pytest.approx(
        expected, rel=1e-6
    )
    assert float(known_load_loss(logits_TE.softmax(-1), torch.full((6,), 1 / 6))) == pytest.approx(
        1.0, rel=1e-6
    )


@pytest.mark.parametrize("kind", ["switch", "sequence", "known"])
def test_parts_of_shards_add_up_to_the_whole_loss_and_gradient(kind):
    """Two ranks hold 8 and 4 tokens of each of two sequences; their parts sum to what one rank has."""
    logits_TE, experts_TK = random_routing(24, 6, 2)
    probs_TE, sequence_T = logits_TE.softmax(-1), torch.arange(24) % 2
    share_E = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0, 0.0])

    def loss(probs, experts, sequences, over_shards=None):
        if kind == "switch":
            return switch_loss(probs, experts, over_shards)
        if kind == "sequence":
            return sequence_loss(probs, experts, sequences, 2, over_shards)
        return known_load_loss(probs, share_E, over_shards)

    whole_TE = probs_TE.clone().requires_grad_()
    whole = loss(whole_TE, experts_TK, sequence_T)
    (expected_TE,) = torch.autograd.grad(whole, whole_TE)
    totals: list[torch.Tensor] = []
    ranks = [slice(0, 16), slice(16, 24)]
    for rows in ranks:  # what each rank would contribute to its all-reduce
        loss(
            probs_TE[rows], experts_TK[rows], sequence_T[rows], lambda values: totals.append(values) or values
        )
    parts, gradients = [], []
    for rows in ranks:
        own_TE = probs_TE[rows].clone().requires_grad_()
        part = loss(own_TE, experts_TK[rows], sequence_T[rows], lambda values: totals[0] + totals[1])
        parts.append(float(part))
        gradients.append(torch.autograd.grad(part, own_TE)[0])
    assert sum(parts) == pytest.approx(float(whole), rel=1e-6)
    torch.testing.assert_close(torch.cat(gradients), expected_TE)


def test_bias_step_lifts_who_has_less_than_the_mean():
    assert bias_step(torch.tensor([1.0, 7.0, 4.0, 4.0], dtype=torch.float64), 0.5).tolist() == [
        0.5,
        -0.5,
        0.0,
        0.0,
    ]
    assert not bias_step(torch.full((7,), 3.0, dtype=torch.float64), 0.5).any()
