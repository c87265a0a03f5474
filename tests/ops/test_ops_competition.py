"""Scores, targets and losses of competitions against plain-Python loops in float64, and the plan against its
own rules.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_hyperrouter.ops import competition
from megatron_hyperrouter.ops.coin import shared_coin
from megatron_hyperrouter.ops.competition import WINDOW, Capped, planned
from megatron_hyperrouter.ops.topk import best_experts

T, D, E, K = 7, 5, 6, 3


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(row):
    total = math.fsum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


def test_scores_against_loops():
    outputs_TED = numbers(T, E, D)
    rows = outputs_TED.double().tolist()
    norms = [[math.sqrt(math.fsum(v * v for v in out)) for out in row] for row in rows]
    means = [[math.fsum(math.log1p(math.exp(v)) for v in out) / D for out in row] for row in rows]
    torch.testing.assert_close(competition.norm_scores(outputs_TED), torch.tensor(norms))
    torch.testing.assert_close(competition.softplus_scores(outputs_TED), torch.tensor(means))
    assert float(competition.softplus_scores(torch.zeros(1, D))) == pytest.approx(math.log(2))
    assert (
        competition.norm_scores(outputs_TED.bfloat16()).dtype
        == competition.softplus_scores(outputs_TED.bfloat16()).dtype
        == torch.float32
    )


def test_shares_sum_to_one_even_of_nothing():
    scores_TK = numbers(T, K).abs()
    expected = [[value / math.fsum(row) for value in row] for row in scores_TK.double().tolist()]
    torch.testing.assert_close(competition.shares(scores_TK), torch.tensor(expected))
    assert not competition.shares(torch.zeros(2, K)).isnan().any()


def test_targets_and_errors_against_loops():
    logits_TE, scores_TE = numbers(T, E, seed=1), numbers(T, E, seed=2).abs()
    experts_TK = best_experts(scores_TE, K)
    target_TE = competition.winners_target(scores_TE, experts_TK)
    targets, mse, kl, hybrid = [], [], [], []
    for logits, scores, winners in zip(
        logits_TE.double().tolist(), scores_TE.double().tolist(), experts_TK.tolist(), strict=True
    ):
        probs, all_shares, of_winners = (
            softmax(logits),
            softmax(scores),
            softmax([scores[i] for i in winners]),
        )
        target = [of_winners[winners.index(i)] if i in winners else 0.0 for i in range(E)]
        targets.append(target)
        mse.append(math.fsum((p - t) ** 2 for p, t in zip(probs, target, strict=True)) / E)
        kl.append(math.fsum(target[i] * (math.log(target[i]) - math.log(probs[i])) for i in winners))
        squares = [(p - t) ** 2 for p, t in zip(probs, all_shares, strict=True)]
        hybrid.append(math.fsum(squares) / E + 0.3 * math.fsum(squares[i] for i in winners) / K)
    torch.testing.assert_close(target_TE, torch.tensor(targets))
    torch.testing.assert_close(competition.squared_error(logits_TE.softmax(-1), target_TE), torch.tensor(mse))
    torch.testing.assert_close(competition.divergence(logits_TE, target_TE), torch.tensor(kl))
    found_T = competition.hybrid_error(logits_TE.softmax(-1), scores_TE.softmax(-1), experts_TK, 0.3)
    torch.testing.assert_close(found_T, torch.tensor(hybrid))


@pytest.mark.parametrize("k", [1, 2, K])
def test_similarity_of_winners_against_loops(k):
    outputs_TKD = numbers(T, k, D)
    expected = []
    for row in outputs_TKD.double().tolist():
        total = 0.0
        for i in range(k):
            for j in range(k):
                if i != j:
                    dot = math.fsum(a * b for a, b in zip(row[i], row[j], strict=True))
                    total += dot / math.sqrt(
                        math.fsum(a * a for a in row[i]) * math.fsum(b * b for b in row[j])
                    )
        expected.append(total / k**2)
    torch.testing.assert_close(
        competition.similarity_of_winners(outputs_TKD), torch.tensor(expected), rtol=1e-5, atol=1e-6
    )


def test_equal_winners_are_as_similar_as_can_be_and_dead_ones_do_no_harm():
    same_TKD = numbers(T, 1, D).expand(T, K, D)
    torch.set_default_dtype(torch.float64)  # another one changes nothing
    try:
        found_T = competition.similarity_of_winners(same_TKD)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found_T, torch.full((T,), (K - 1) / K))
    dead_TKD = torch.zeros(T, K, D, requires_grad=True)
    (competition.similarity_of_winners(dead_TKD).sum() + competition.norm_scores(dead_TKD).sum()).backward()
    assert not dead_TKD.grad.isnan().any()


def test_decaying_rate_is_the_published_one():
    """methods.md 4.1: 0.667, 0.586, 0.536, ... 0.25 at i = 35."""
    assert [round(competition.decaying_rate(i), 3) for i in (0, 1, 2, 35)] == [0.667, 0.586, 0.536, 0.25]


def plan_by_hand(schedule: Capped, window: int) -> list[set[int]]:
    """The rule of the plan, step by step, from a table of who competes."""
    first, last = window * WINDOW, (window + 1) * WINDOW - 1
    table = {step: set() for step in range(first, last + 1)}
    for step in range(max(first, schedule.warm_up), last + 1):
        drawn = []
        for layer in range(1, schedule.num_layers + 1):
            coin = shared_coin(seed=schedule.seed, step=step, layer=layer)
            if coin < schedule.rate:
                drawn.append((coin, layer))
        for _, layer in sorted(drawn):
            free = [
                other
                for other in table
                if other >= schedule.warm_up
                and len(table[other]) < schedule.max_competing
                and layer not in table[other]
            ]
            earlier, later = (
                [other for other in free if other <= step],
                [other for other in free if other > step],
            )
            if earlier:
                table[max(earlier)].add(layer)
            elif later:
                table[min(later)].add(layer)
    return [table[step] for step in sorted(table)]


@given(
    seed=st.integers(0, 1000),
    rate=st.sampled_from([0.02, 0.07, 0.3, 1.0]),
    warm_up=st.integers(0, 3 * WINDOW),
    num_layers=st.integers(1, 8),
    max_competing=st.integers(1, 4),
    window=st.integers(0, 3),
)
def test_the_plan_keeps_its_rules(seed, rate, warm_up, num_layers, max_competing, window):
    schedule = Capped(seed, rate, warm_up, num_layers, max_competing)
    plan = planned(schedule, window)
    assert [set(layers) for layers in plan] == plan_by_hand(schedule, window)
    assert all(len(layers) <= max_competing for layers in plan)
    steps = range(window * WINDOW, (window + 1) * WINDOW)
    assert not any(plan[step % WINDOW] for step in steps if step < warm_up)
    drawn = sum(
        shared_coin(seed=seed, step=s, layer=n) < rate
        for s in steps
        if s >= warm_up
        for n in range(1, num_layers + 1)
    )
    room = min(max_competing, num_layers) * sum(step >= warm_up for step in steps)
    placed = sum(map(len, plan))
    assert placed <= min(drawn, room)
    if rate * num_layers < 0.5 * max_competing:
        assert placed == drawn  # none lapses where there is room


def test_without_a_cap_the_plan_is_the_coins():
    schedule = Capped(seed=3, rate=0.2, warm_up=10, num_layers=4, max_competing=4)
    for step in range(2 * WINDOW):
        for layer in range(1, 5):
            tossed = step >= 10 and shared_coin(seed=3, step=step, layer=layer) < 0.2
            assert schedule.competes(step=step, layer=layer) == tossed


def test_the_rate_is_met_and_no_layer_is_favoured():
    schedule = Capped(seed=1, rate=0.07, warm_up=0, num_layers=16, max_competing=3)
    counts = [
        sum(schedule.competes(step=step, layer=layer) for step in range(8 * WINDOW)) for layer in range(1, 17)
    ]
    steps = 8 * WINDOW
    sigma = math.sqrt(steps * 0.07 * 0.93)
    assert all(abs(count - 0.07 * steps) < 4 * sigma for count in counts)
    assert abs(sum(counts) - 16 * 0.07 * steps) < 4 * sigma * 4


def test_asked_in_any_order_and_far_out_it_is_the_same_plan():
    schedule = Capped(seed=1, rate=0.1, warm_up=5, num_layers=3, max_competing=1)
    steps = [999_999, 0, 5, 70_000, 999_999, 6]
    once = [schedule.competes(step=step, layer=2) for step in steps]
    planned.cache_clear()
    assert once == [schedule.competes(step=step, layer=2) for step in steps]
    code = (
        "from megatron_hyperrouter.ops.competition import Capped\n"
        "print([Capped(1, 0.1, 5, 3, 1).competes(step=s, layer=2) for s in range(600)])"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert said == str([schedule.competes(step=step, layer=2) for step in range(600)])
