"""What is counted and kept while routers work, against plain loops; routes of a probe set
computed by hand.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_hyperrouter import build_router
from megatron_hyperrouter.analysis.experts import comparable_tokens, similarity_matrix
from megatron_hyperrouter.analysis.routes import chance, fluctuation, saturation
from megatron_hyperrouter.analysis.watching import Witness, chosen, watching
from megatron_hyperrouter.ops.similarity import linear_cka
from megatron_hyperrouter.routers.base import Tokens

T, D, E = 12, 6, 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_measures_against_loops() -> None:
    routers = [
        build_router("topk", hidden_size=D, num_experts=E, topk=2, layer_number=number, init_std=0.5)
        for number in (1, 3)
    ]
    batches = [drawn(T, D, seed=seed) for seed in (1, 2)]
    seen = Witness(routers, every=5)
    with watching(routers, seen.see):
        inside = [router(x_TD) for router in routers for x_TD in batches]
    for router, first in zip(routers, (0, 2), strict=True):
        logits = torch.cat([routing.logits_TE for routing in inside[first : first + 2]]).double()
        rows = [[math.exp(g) for g in row] for row in logits.tolist()]
        probs = [[value / sum(row) for value in row] for row in rows]
        entropy = sum(-p * math.log(p) for row in probs for p in row) / (2 * T)
        mean_E = [sum(row[e] for row in probs) / (2 * T) for e in range(E)]
        information = -sum(p * math.log(p) for p in mean_E) - entropy
        std = math.sqrt(sum(float(row.var(correction=0)) for row in logits) / (2 * T))
        counts = [0] * E
        for routing in inside[first : first + 2]:
            for expert in routing.experts_TK.flatten().tolist():
                counts[expert] += 1
        found = seen.measures()[router.layer_number]
        assert found["entropy"] == pytest.approx(entropy, rel=1e-6)
        assert found["mutual_information"] == pytest.approx(information, rel=1e-5)
        assert found["logit_std"] == pytest.approx(std, rel=1e-6)
        assert found["load_max_over_mean"] == pytest.approx(max(counts) * E / (4 * T))
        assert seen.loads()[router.layer_number] == pytest.approx([count * E / (4 * T) for count in counts])
        sample = seen.samples[router.layer_number]
        golden = (math.sqrt(5) - 1) / 2
        places = [math.floor(5 * (block + block * golden % 1)) for block in range(5)]
        assert torch.equal(sample.x_ND, torch.cat(batches)[[place for place in places if place < 2 * T]])
        assert torch.equal(sample.first(3).x_ND, sample.x_ND[::2])
        outside = router(batches[0])
        assert torch.equal(outside.experts_TK, inside[first].experts_TK)
        assert "refine" not in vars(router)


@pytest.mark.parametrize("every", [1, 32, 64, 100, 192])
def test_a_sample_has_tokens_from_all_positions_of_a_sequence(every: int) -> None:
    """A stride that has a divisor in common with the sequence length would always find the same ones."""
    length, total = 64, 64 * 192
    places = chosen(every, 0, total)
    assert (places // every).tolist() == list(range(len(places)))
    assert total // every - 1 <= len(places) <= -(-total // every)
    tenths = torch.bincount(places % length * 8 // length, minlength=8).double() / len(places)
    assert float((tenths - 1 / 8).abs().max()) < 0.05
    parts = [chosen(every, begin, begin + 96) + begin for begin in range(0, total, 96)]
    assert torch.equal(torch.cat(parts), places)


@pytest.mark.parametrize(("std", "entropy"), [(0.16, 2.76), (0.58, 2.62), (1.0, 2.36), (2.0, 1.65)])
def test_entropy_of_normal_logits(std: float, entropy: float) -> None:
    """Known figures of softmax(N(0, std^2)) over 16 experts."""
    router = build_router("topk", hidden_size=16, num_experts=16, topk=2)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(16) * std)
    seen = Witness([router], every=1000)
    with watching([router], seen.see), torch.no_grad():
        router(drawn(20_000, 16, seed=3))
    assert seen.measures()[1]["entropy"] == pytest.approx(entropy, abs=0.015)
    assert seen.measures()[1]["logit_std"] == pytest.approx(std * math.sqrt(15 / 16), rel=0.01)


def test_a_router_that_follows_words_is_seen_as_it_decides() -> None:
    """The second stage of StableMoE chooses experts from the token ids, after its logits are computed."""
    router = build_router("stablemoe", hidden_size=D, num_experts=E, topk=1, stage1_steps=0).eval()
    tokens = Tokens(torch.arange(T) % 7, torch.arange(T), T)
    seen = Witness([router], every=1)
    with watching([router], seen.see):
        inside = router(drawn(T, D), step=3, tokens=tokens)
    assert torch.equal(seen.samples[1].experts_NK, inside.experts_TK)
    assert torch.equal(seen.samples[1].tokens[0].ids_T, tokens.ids_T)
    by_logits = inside.logits_TE.argmax(1)
    assert not torch.equal(by_logits, inside.experts_TK[:, 0])


def test_similarity_matrix_against_pairs() -> None:
    outputs_END = drawn(E, 30, D, seed=4)
    outputs_END[3] = 2.0 * outputs_END[1] + 5.0
    matrix_EE = similarity_matrix(outputs_END)
    for i in range(E):
        for j in range(E):
            assert float(matrix_EE[i, j]) == pytest.approx(
                float(linear_cka(outputs_END[i], outputs_END[j])), abs=1e-5
            )
    assert float(matrix_EE[1, 3]) == pytest.approx(1.0, abs=1e-5)
    for scale in (1e-12, 1e12):
        assert torch.allclose(similarity_matrix(scale * outputs_END), matrix_EE, atol=1e-5)
    bad_END = outputs_END.clone()
    bad_END[1, 0, 0] = float("nan")
    found_EE = similarity_matrix(bad_END)
    assert found_EE[1].isnan().all() and not found_EE[0, 2:].isnan().any()
    outputs_END[0], outputs_END[2] = 0.1, 0.7  # their means are rounded
    for constant in (0, 2):
        assert similarity_matrix(outputs_END)[constant].tolist() == [0.0] * E


def test_tokens_to_compare_fit_in_memory() -> None:
    assert comparable_tokens(16, 64) == 256
    count = comparable_tokens(256, 7168)
    assert count > 1 and count * 256 * 7168 <= 1 << 27 and count**2 * 256 <= 1 << 27


def test_routes_by_hand() -> None:
    final = torch.tensor([[0, 1], [1, 2], [3, 0]])
    early = torch.tensor([[1, 0], [3, 2], [1, 2]])
    assert saturation(early, final) == pytest.approx((2 + 1 + 0) / 6)
    assert saturation(final, final) == 1.0
    assert fluctuation(early, final) == 1.0
    assert fluctuation(final, torch.tensor([[0, 2], [1, 0], [1, 0]])) == pytest.approx(1 / 3)


def test_routes_by_chance() -> None:
    even = torch.stack([torch.arange(4000) % E, (torch.arange(4000) + 1) % E], 1)
    assert chance(even, E) == pytest.approx((2 / E, 1 - 1 / E))
    drawn_twice = [torch.stack([torch.randperm(5)[:2] % E for _ in range(3000)]) for _ in range(2)]
    kept, moved = chance(drawn_twice[1], E)
    assert fluctuation(drawn_twice[0], drawn_twice[1]) == pytest.approx(moved, abs=0.03)
    assert kept < 1
