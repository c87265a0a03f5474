"""Balance losses and numbers, against plain-Python loops in float64 and megatron-core."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_hyperrouter.ops.balance import entropy, load, switch_loss, z_loss
from megatron_hyperrouter.ops.topk import topk_softmax


def random_routing(num_tokens: int, num_experts: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits_TE = 2 * torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(num_tokens + k))
    return logits_TE, topk_softmax(logits_TE, k)[1]


@pytest.mark.parametrize(("num_tokens", "num_experts", "k"), [(1, 4, 1), (17, 4, 2), (30, 9, 9)])
def test_switch_loss_against_loops(num_tokens, num_experts, k):
    logits_TE, experts_TK = random_routing(num_tokens, num_experts, k)
    probs = logits_TE.softmax(-1).double().tolist()
    expected = 0.0
    for expert in range(num_experts):
        routes = sum(row.count(expert) for row in experts_TK.tolist())
        expected += num_experts * (routes / (num_tokens * k)) * (sum(row[expert] for row in probs) / num_tokens)
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
    theirs = moe_utils.switch_load_balancing_loss_func(logits_TE.softmax(-1), load(experts_TK, 8), 24, 3, 8, 1.0)
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


def test_entropy_is_ln_E_when_uniform_and_zero_when_certain():
    assert float(entropy(torch.zeros(3, 16))) == pytest.approx(math.log(16))
    certain_TE = torch.full((3, 4), -math.inf).index_fill(1, torch.tensor([2]), 0.0)
    assert float(entropy(certain_TE)) == 0.0


def test_load_counts_routes_of_experts_nobody_chose_too():
    _, experts_TK = random_routing(11, 7, 3)
    flat = experts_TK.flatten().tolist()
    assert load(experts_TK, 9).tolist() == [flat.count(expert) for expert in range(9)]
    assert load(experts_TK, 9).dtype == torch.int64
