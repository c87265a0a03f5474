"""The k best experts, against a Python sort and megatron-core."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hyperrouter.ops.topk import Groups, best_experts, scored_topk, softmax_topk, topk_softmax

LOGITS = st.sampled_from([-math.inf, -2.5, -1.0, 0.0, 0.5, 1.0, 3.0])  # few values, so that ties are common


def chosen_by_sort(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]


def softmax_loop(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / math.fsum(powers) for power in powers]


@given(st.data(), st.sampled_from([1, 3, 8, 40]), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_equal_logits_go_to_the_lower_id(data, num_experts, num_tokens):
    k = data.draw(st.integers(1, num_experts))
    rows = data.draw(
        st.lists(
            st.lists(LOGITS, min_size=num_experts, max_size=num_experts),
            min_size=num_tokens,
            max_size=num_tokens,
        )
    )
    assert best_experts(torch.tensor(rows), k).tolist() == [chosen_by_sort(row, k) for row in rows]


@pytest.mark.parametrize(("num_experts", "k"), [(16, 1), (32, 2), (48, 3), (32, 8), (64, 6), (200, 200)])
def test_rounds_and_keys_agree_with_the_sort_on_any_floats(num_experts, k):
    """Where E >= 16 k the choice is made by rounds of argmax; of 32 experts and more, by ordered keys."""
    # ties in every row
    logits_TE = torch.randn(200, num_experts, generator=torch.Generator().manual_seed(1)).mul(3).round()
    logits_TE[0], logits_TE[1, 5], logits_TE[2] = -math.inf, math.nan, torch.finfo(torch.float32).min
    logits_TE[3, ::2], logits_TE[3, 1::2], logits_TE[4, 7], logits_TE[5, 3] = 0.0, -0.0, -math.nan, math.inf
    logits_TE[6] = logits_TE[6] * 1e-42  # too small to be normal
    by_sort = torch.sort(logits_TE, dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(best_experts(logits_TE, k), by_sort)


@pytest.mark.parametrize(("num_experts", "k"), [(5, 1), (8, 3), (8, 8), (33, 2)])
@pytest.mark.parametrize("function", [topk_softmax, softmax_topk])
def test_weights_against_loops(function, num_experts, k):
    logits_TE = torch.randn(20, num_experts, generator=torch.Generator().manual_seed(2))
    weights_TK, experts_TK = function(logits_TE, k)
    assert weights_TK.dtype == torch.float32
    assert experts_TK.dtype == torch.int64
    for row, weights, experts in zip(
        logits_TE.double().tolist(), weights_TK.tolist(), experts_TK.tolist(), strict=True
    ):
        assert experts == chosen_by_sort(row, k)
        kept = (
            softmax_loop([row[i] for i in experts])
            if function is topk_softmax
            else [softmax_loop(row)[i] for i in experts]
        )
        assert weights == pytest.approx(kept, abs=1e-6)


@pytest.mark.parametrize(("num_experts", "k"), [(6, 2), (6, 6), (32, 2)])
@pytest.mark.parametrize("function", [topk_softmax, softmax_topk])
def test_gradient_against_finite_differences(function, num_experts, k):
    logits_TE = torch.randn(
        3, num_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True
    )
    assert torch.autograd.gradcheck(lambda logits: function(logits, k)[0], logits_TE)


def test_one_kept_logit_gets_no_gradient_but_switch_does():
    logits_TE = torch.randn(4, 6, generator=torch.Generator().manual_seed(4), requires_grad=True)
    (kept,) = torch.autograd.grad(topk_softmax(logits_TE, 1)[0].sum(), logits_TE)
    (switch,) = torch.autograd.grad(softmax_topk(logits_TE, 1)[0].sum(), logits_TE)
    assert not kept.any()
    assert switch.any(1).all()


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("pre_softmax", [False, True])
def test_megatron_core_chooses_and_weighs_alike(k, pre_softmax):
    moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    logits_TE = torch.randn(64, 8, generator=torch.Generator().manual_seed(5))
    probs_TE, map_TE = moe_utils.topk_routing_with_score_function(logits_TE, k, use_pre_softmax=pre_softmax)
    weights_TK, experts_TK = (softmax_topk if pre_softmax else topk_softmax)(logits_TE, k)
    assert torch.equal(torch.zeros(64, 8, dtype=torch.bool).scatter(1, experts_TK, True), map_TE)
    torch.testing.assert_close(
        torch.zeros(64, 8).scatter(1, experts_TK, weights_TK), probs_TE, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("k", [0, 5, -1])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"k = {k}: must be from 1 to E = 4"):
        topk_softmax(torch.zeros(2, 4), k)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_scores_weigh_and_the_biased_scores_choose(score, renormalise, with_bias):
    generator = torch.Generator().manual_seed(6)
    logits_TE = torch.randn(30, 7, generator=generator)
    choice_bias_E = 0.3 * torch.randn(7, generator=generator) if with_bias else None
    weights_TK, experts_TK = scored_topk(
        logits_TE, 3, score=score, renormalise=renormalise, choice_bias_E=choice_bias_E
    )
    moved = 0
    for row, weights, experts in zip(
        logits_TE.double().tolist(), weights_TK.tolist(), experts_TK.tolist(), strict=True
    ):
        own = softmax_loop(row) if score == "softmax" else [sigmoid(value) for value in row]
        compared = [
            s + b for s, b in zip(own, choice_bias_E.tolist() if with_bias else [0.0] * 7, strict=True)
        ]
        assert experts == chosen_by_sort(compared, 3)
        moved += experts != chosen_by_sort(own, 3)
        total = sum(own[i] for i in experts) if renormalise else 1.0
        assert weights == pytest.approx([own[i] / total for i in experts], abs=1e-6)
    assert bool(moved) == with_bias


def test_renormalised_sigmoids_that_underflow_are_still_weights():
    weights_TK, _ = scored_topk(torch.tensor([[-200.0, -201.0, -300.0]]), 2, score="sigmoid")
    assert weights_TK[0].tolist() == pytest.approx(softmax_loop([0.0, -1.0]), abs=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_gradient_of_scores_against_finite_differences(score, renormalise):
    logits_TE = torch.randn(
        3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True
    )
    bias_E = torch.linspace(-0.3, 0.3, 6, dtype=torch.float64)

    def weigh(logits):
        return scored_topk(logits, 2, score=score, renormalise=renormalise, choice_bias_E=bias_E)[0]

    assert torch.autograd.gradcheck(weigh, logits_TE)


def test_megatron_core_has_deepseek_v3s_choice():
    moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    generator = torch.Generator().manual_seed(8)
    logits_TE, bias_E = torch.randn(64, 8, generator=generator), 0.2 * torch.randn(8, generator=generator)
    probs_TE, map_TE = moe_utils.topk_routing_with_score_function(
        logits_TE, 3, score_function="sigmoid", expert_bias=bias_E
    )
    weights_TK, experts_TK = scored_topk(logits_TE, 3, score="sigmoid", choice_bias_E=bias_E)
    assert torch.equal(torch.zeros(64, 8, dtype=torch.bool).scatter(1, experts_TK, True), map_TE)
    torch.testing.assert_close(
        torch.zeros(64, 8).scatter(1, experts_TK, weights_TK), probs_TE, rtol=0, atol=1e-6
    )


def limited_by_loop(row: list[float], k: int, groups: Groups) -> list[int]:
    """Group-limited choice, expert by expert."""
    size = len(row) // groups.total
    counted = min(max(k // groups.chosen, 1), size)
    totals = [
        math.fsum(sorted(row[first : first + size], reverse=True)[:counted])
        for first in range(0, len(row), size)
    ]
    best = chosen_by_sort(totals, groups.chosen)
    inside = [row[i] if i // size in best else -math.inf for i in range(len(row))]
    return chosen_by_sort(inside, k)


@given(st.data(), st.sampled_from([(4, 2, 2), (2, 1, 8), (8, 3, 4), (3, 3, 2)]), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_groups_against_a_loop(data, sizes, num_tokens):
    count, chosen, size = sizes
    k = data.draw(st.integers(1, chosen * size))
    values = st.sampled_from([-2.5, -1.0, 0.0, 0.5, 1.0, 3.0])
    row = st.lists(values, min_size=count * size, max_size=count * size)
    rows = data.draw(st.lists(row, min_size=num_tokens, max_size=num_tokens))
    groups = Groups(count, chosen)
    found = best_experts(torch.tensor(rows), k, groups).tolist()
    assert found == [limited_by_loop(row, k, groups) for row in rows]


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("kind", ["softmax", "pre_softmax", "sigmoid", "sigmoid, bias"])
def test_groups_against_megatron_core(kind, k):
    """DeepSeek-V3's node-limited routing as the host of the other engine has it."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    generator = torch.Generator().manual_seed(7)
    logits_TE = torch.randn(50, 16, generator=generator)
    bias_E = 0.3 * torch.randn(16, generator=generator) if kind == "sigmoid, bias" else None
    score = "sigmoid" if "sigmoid" in kind else "softmax"
    dense_TE, chosen_TE = topk_routing_with_score_function(
        logits_TE,
        k,
        use_pre_softmax=kind == "pre_softmax",
        num_groups=8,
        group_topk=2,
        score_function=score,
        expert_bias=bias_E,
    )
    options = {"score": score, "renormalise": kind != "pre_softmax", "choice_bias_E": bias_E}
    weights_TK, experts_TK = scored_topk(logits_TE, k, groups=Groups(8, 2), **options)
    assert torch.equal(torch.zeros_like(chosen_TE).scatter(1, experts_TK, True), chosen_TE)
    torch.testing.assert_close(torch.zeros_like(logits_TE).scatter(1, experts_TK, weights_TK), dense_TE)


def test_groups_must_have_room_for_k():
    with pytest.raises(ValueError, match="k = 5: must be at most 4, the number of experts in 2 groups of 2"):
        best_experts(torch.zeros(1, 16), 5, Groups(8, 2))
