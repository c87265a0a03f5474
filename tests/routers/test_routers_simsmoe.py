"""SimSMoE against plain-Python loops in float64: which pairs are due, which tokens are compared, and the
loss.
"""

from __future__ import annotations

import math
import statistics
import threading
from functools import partial
from typing import Any

import pytest
import torch
from cka_loops import Matrix, cka, linear_kernel, rbf_kernel
from fakes import ThreadRanks
from torch import Tensor

from megatron_hyperrouter import build_router
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.ops.similarity import linear_cka, median_distance, rbf_cka
from megatron_hyperrouter.routers.base import Pass, Routing, StepCounts, Tokens
from megatron_hyperrouter.routers.simsmoe import SimSMoERouter

T, D, E = 40, 12, 5
PAIRS = [(i, j) for i in range(E) for j in range(i + 1, E)]


def small(**changes: Any) -> SimSMoERouter:
    settings = {
        "hidden_size": D,
        "num_experts": E,
        "topk": 3,
        "init_std": 0.5,
        "threshold": 0.0,
        "similarity_coeff": 0.25,
        "seed": 5,
    }
    router = build_router("simsmoe", **{**settings, **changes})
    assert isinstance(router, SimSMoERouter)
    with torch.no_grad():  # biases that are 0 would hide behind the weights
        for name, parameter in router.named_parameters():
            if "bias" in name:
                parameter.copy_(torch.linspace(-0.3, 0.4, parameter.numel()))
    return router


def due(router: SimSMoERouter, *pairs: tuple[int, int]) -> SimSMoERouter:
    """Counts such that these are the pairs of the next step, in this order."""
    counts = [float(pair in pairs) * (100.0 - pairs.index(pair) if pair in pairs else 1.0) for pair in PAIRS]
    router.pair_counts_P.copy_(torch.tensor(counts))
    router.begin_step()
    assert router.due_pairs() == pairs
    return router


def tokens(num_tokens: int = T) -> Tensor:
    return torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(2))


def bank(x_TD: Tensor, experts_TK: Tensor) -> Tensor:
    """Outputs of the chosen experts, which have something in common."""
    generator = torch.Generator().manual_seed(1)
    common_DD, own_EDD = torch.randn(D, D, generator=generator), torch.randn(E, D, D, generator=generator)
    all_TED = torch.tanh(torch.einsum("td,edf->tef", x_TD, common_DD + own_EDD))
    return all_TED.gather(1, experts_TK.unsqueeze(-1).expand(-1, -1, D))


def run(router: SimSMoERouter, x_TD: Tensor, **arguments: Any) -> tuple[Routing, Tensor]:
    """One pass as an engine makes it; the outputs are leaves."""
    now = router.at(**arguments)
    first = router(x_TD, **arguments)
    outputs_TKD = bank(x_TD, first.experts_TK).detach().requires_grad_()
    assert router.wants_outputs(now)
    return router.combine(first, x_TD, outputs_TKD, now), outputs_TKD


def head_in_loops(router: SimSMoERouter, outputs: Matrix) -> Matrix:
    weights = {name: part.double().tolist() for name, part in router.state_dict().items()}

    def layer(rows: Matrix, weight: Matrix, bias: list[float]) -> Matrix:
        return [
            [
                math.fsum(w * v for w, v in zip(ws, row, strict=True)) + b
                for ws, b in zip(weight, bias, strict=True)
            ]
            for row in rows
        ]

    if router.config.head == "mlp":
        hidden = layer(outputs, weights["head_in_WD"], weights["head_in_bias_W"])
        outputs = [[v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in row] for row in hidden]
    return layer(outputs, weights["head_out_FW"], [0.0] * len(weights["head_out_FW"]))


def sides_in_loops(
    router: SimSMoERouter, experts_TK: Tensor, outputs_TKD: Tensor, pair: tuple[int, int]
) -> tuple[Matrix, Matrix]:
    """Features of both experts on the tokens that have both, in the order of the rows."""
    sides: tuple[Matrix, Matrix] = ([], [])
    for ids, outputs in zip(experts_TK.tolist(), outputs_TKD.double().tolist(), strict=True):
        if pair[0] in ids and pair[1] in ids:
            for side, expert in zip(sides, pair, strict=True):
                side.append(outputs[ids.index(expert)])
    return head_in_loops(router, sides[0]), head_in_loops(router, sides[1])


def cka_in_loops(router: SimSMoERouter, x: Matrix, y: Matrix) -> float:
    if router.config.kernel == "linear":
        return cka(x, y, linear_kernel)
    if router.config.bandwidth == "absolute":
        return cka(x, y, rbf_kernel(router.config.sigma))
    medians = [
        statistics.median_low([math.dist(a, b) for n, a in enumerate(side) for b in side[:n]])
        for side in (x, y)
    ]
    return cka(x, y, *(rbf_kernel(router.config.sigma * median) for median in medians))


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"kernel": "linear", "head": "linear"},
    "published": {"bandwidth": "absolute", "head": "linear", "bias": True},
    "wide": {"head_width": 9, "head_features": 7, "sigma": 0.4, "bias": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_against_loops(options):
    router = due(small(**options), (1, 3), (2, 4))
    routing, outputs_TKD = run(router, tokens())
    parts = [
        cka_in_loops(router, *sides_in_loops(router, routing.experts_TK, outputs_TKD.detach(), pair))
        for pair in router.due_pairs()
    ]
    assert all(0.05 < part < 0.999 for part in parts)
    assert float(routing.losses["similarity"].detach()) == pytest.approx(0.25 * sum(parts), rel=1e-4)
    plain = build_router("topk", hidden_size=D, num_experts=E, topk=3, bias=router.config.bias)
    plain.load_state_dict(
        {name: part for name, part in router.state_dict().items() if name in plain.state_dict()}
    )
    for left, right in zip(routing[:3], plain(tokens())[:3], strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_against_one_pair_at_a_time_in_float64(options):
    router = due(small(**options), (1, 3), (2, 4))
    routing, outputs_TKD = run(router, tokens())
    head = {name: part for name, part in router.named_parameters() if name.startswith("head_")}
    found = torch.autograd.grad(routing.losses["similarity"], [outputs_TKD, *head.values()])
    exact_TKD = outputs_TKD.detach().double().requires_grad_()
    exact = {name: part.detach().double().requires_grad_() for name, part in head.items()}
    loss = torch.zeros((), dtype=torch.float64)
    for pair in router.due_pairs():
        shared_T = [t for t, ids in enumerate(routing.experts_TK.tolist()) if set(pair) <= set(ids)]
        sides = []
        for expert in pair:
            side = torch.stack([exact_TKD[t, routing.experts_TK[t].tolist().index(expert)] for t in shared_T])
            if "head_in_WD" in exact:
                side = torch.nn.functional.gelu(side @ exact["head_in_WD"].T + exact["head_in_bias_W"])
            side = side @ exact["head_out_FW"].T
            relative = router.config.kernel == "rbf" and router.config.bandwidth == "median"
            sides.append(side / median_distance(side) if relative else side)
        loss = loss + 0.25 * (
            linear_cka(*sides) if router.config.kernel == "linear" else rbf_cka(*sides, router.config.sigma)
        )
    for left, right in zip(found, torch.autograd.grad(loss, [exact_TKD, *exact.values()]), strict=True):
        torch.testing.assert_close(left.double(), right, rtol=1e-3, atol=1e-6)
    assert found[0].abs().max() > 1e-4


def test_pairs_below_the_threshold_cost_nothing():
    probe = due(small(), (1, 3), (2, 4))
    routing, outputs_TKD = run(probe, tokens())
    values = [
        cka_in_loops(probe, *sides_in_loops(probe, routing.experts_TK, outputs_TKD.detach(), pair))
        for pair in probe.due_pairs()
    ]
    between = sum(values) / 2
    assert min(values) < between < max(values)
    routing, outputs_TKD = run(due(small(threshold=between), (1, 3), (2, 4)), tokens())
    assert float(routing.losses["similarity"].detach()) == pytest.approx(0.25 * max(values), rel=1e-4)
    routing, outputs_TKD = run(due(small(threshold=1.0), (1, 3), (2, 4)), tokens())
    (gradient,) = torch.autograd.grad(routing.losses["similarity"], outputs_TKD)
    assert float(routing.losses["similarity"].detach()) == 0.0
    assert not gradient.any()


@pytest.mark.parametrize("num_tokens", [0, 1, 6])
def test_too_few_tokens_are_skipped_and_finite(num_tokens):
    routing, outputs_TKD = run(due(small(), (0, 1), (2, 4), (1, 3)), tokens(num_tokens))
    assert float(routing.losses["similarity"].detach()) == 0.0
    routing.losses["similarity"].backward()
    assert outputs_TKD.grad is not None
    assert torch.isfinite(outputs_TKD.grad).all()
    assert not outputs_TKD.grad.any()


def test_as_many_tokens_as_asked_for_are_enough():
    router = due(small(), (1, 3))
    first = router(tokens())
    shared = sum({1, 3} <= set(ids) for ids in first.experts_TK.tolist())
    assert shared > 4
    for least, counts in ((shared, True), (shared + 1, False)):
        routing, _ = run(due(small(min_tokens=least), (1, 3)), tokens())
        assert bool(routing.losses["similarity"].detach() > 0) is counts


def test_most_tokens_are_evenly_spaced_over_places_whatever_the_rows():
    places_T = 7 + 3 * torch.randperm(T, generator=torch.Generator().manual_seed(4))
    router = due(small(max_tokens=8), (1, 3))
    first = router(tokens())
    order = sorted(range(T), key=lambda t: int(places_T[t]))
    shared = [t for t in order if {1, 3} <= set(first.experts_TK[t].tolist())]
    n = len(shared)
    assert n > 12
    kept = [t for rank, t in enumerate(shared) if (rank + 1) * 8 // n > rank * 8 // n]
    assert len(kept) == 8
    gaps = [
        b - a
        for a, b in zip(
            [shared.index(t) for t in kept][:-1], [shared.index(t) for t in kept][1:], strict=True
        )
    ]
    assert max(gaps) - min(gaps) <= 1

    def losses(rows_T: Tensor) -> tuple[float, set[int]]:
        facts = Tokens(ids_T=torch.zeros(T, dtype=torch.int64), places_T=places_T[rows_T], seq_length=T)
        routing, outputs_TKD = run(router, tokens()[rows_T], tokens=facts)
        (gradient_TKD,) = torch.autograd.grad(routing.losses["similarity"], outputs_TKD)
        return float(routing.losses["similarity"].detach()), {
            int(rows_T[t]) for t in gradient_TKD.any(-1).any(-1).nonzero()[:, 0]
        }

    value, compared = losses(torch.arange(T))
    assert compared == set(kept)
    sides = sides_in_loops(router, first.experts_TK[kept], bank(tokens(), first.experts_TK)[kept], (1, 3))
    assert value == pytest.approx(0.25 * cka_in_loops(router, *sides), rel=1e-4)
    assert losses(torch.arange(T).flip(0)) == (pytest.approx(value, rel=1e-6), set(kept))


def test_permuting_experts_with_their_rows_changes_only_their_order():
    order_E = [3, 0, 4, 1, 2]  # expert i is the old expert order_E[i]
    old, new = due(small(), (1, 3), (2, 4)), small()
    state = old.state_dict()
    state["weight_ED"] = state["weight_ED"][order_E]
    old_count = dict(zip(PAIRS, old.pair_counts_P.tolist(), strict=True))
    state["pair_counts_P"] = torch.tensor(
        [old_count[tuple(sorted((order_E[i], order_E[j])))] for i, j in PAIRS], dtype=torch.float64
    )
    new.load_state_dict(state)
    assert [tuple(sorted((order_E[i], order_E[j]))) for i, j in new.due_pairs()] == [(1, 3), (2, 4)]
    before, outputs_TKD = run(old, tokens())
    first = new(tokens())
    assert torch.equal(torch.tensor(order_E)[first.experts_TK], before.experts_TK)
    after = new.combine(first, tokens(), outputs_TKD, new.at())
    torch.testing.assert_close(after.losses["similarity"], before.losses["similarity"])


class Meeting:
    """Ranks that are threads and share a micro-batch."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.brought = threading.Barrier(ranks), [torch.empty(0)] * ranks

    def gather(self, rank: int, rows: Tensor) -> Tensor:
        self.brought[rank] = rows.detach()
        self.barrier.wait(timeout=20)
        whole = torch.cat([rows if other == rank else part for other, part in enumerate(self.brought)])
        self.barrier.wait(timeout=20)
        return whole

    def sum(self, rank: int, values: Tensor) -> Tensor:
        return self.gather(rank, values[None]).detach().sum(0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_micro_batch_spread_over_ranks(options):
    """Context parallelism's cut, both ends to the first rank: the parts add up to the loss and the
    gradients of one rank.
    """
    rows = [torch.tensor([*range(10), *range(30, 40)]), torch.arange(10, 30)]
    pairs = ((1, 3), (2, 4), (0, 1))
    router = due(small(max_tokens=11, **options), *pairs)
    whole, outputs_TKD = run(router, tokens())
    names = [name for name, _ in router.named_parameters() if name.startswith("head_")]
    expected = torch.autograd.grad(
        whole.losses["similarity"], [outputs_TKD, *map(router.get_parameter, names)]
    )
    meeting = Meeting(2)

    def one(rank: ThreadRanks) -> tuple[Tensor, ...]:
        own, number = due(small(max_tokens=11, **options), *pairs), rank.place.rank
        own.gather_shards, own.over_shards = partial(meeting.gather, number), partial(meeting.sum, number)
        facts = Tokens(ids_T=rows[number], places_T=rows[number] + 512, seq_length=T)
        routing, outputs = run(own, tokens()[rows[number]], tokens=facts)
        loss = routing.losses["similarity"]
        return loss.detach(), *torch.autograd.grad(loss, [outputs, *map(own.get_parameter, names)])

    (loss_0, outputs_0, *head_0), (loss_1, outputs_1, *head_1) = ThreadRanks.run(2, one)
    torch.testing.assert_close(loss_0 + loss_1, whole.losses["similarity"].detach())
    torch.testing.assert_close(outputs_0, expected[0][rows[0]])
    torch.testing.assert_close(outputs_1, expected[0][rows[1]])
    for left, right, both in zip(head_0, head_1, expected[1:], strict=True):
        torch.testing.assert_close(left + right, both, rtol=1e-4, atol=1e-6)


def test_a_spread_micro_batch_needs_places():
    router = due(small(), (1, 3))
    router.gather_shards = lambda rows: rows
    with pytest.raises(ValueError, match="needs the positions of the tokens"):
        run(router, tokens())


# ----------------------------------------------------------------------------------------- counting
@pytest.mark.parametrize("k", range(1, E + 1))
def test_shared_tokens_against_loops(k):
    router = small(topk=k)
    routing = router(tokens())
    counts = router.extra_counts(routing)
    assert counts.dtype == torch.float64
    assert counts.tolist() == [
        sum({i, j} <= set(ids) for ids in routing.experts_TK.tolist()) for i, j in PAIRS
    ]
    assert router.num_extra_counts == len(PAIRS) == counts.numel()


def step(router: SimSMoERouter, number: int, extra: list[float], num_tokens: float) -> None:
    counts = StepCounts(
        number, num_tokens, torch.zeros(E, dtype=torch.float64), torch.tensor(extra, dtype=torch.float64)
    )
    router.end_step(counts)


def shares(number: int) -> list[float]:
    return (100 * torch.rand(len(PAIRS), generator=torch.Generator().manual_seed(number))).round().tolist()


def test_counts_and_due_pairs_against_a_loop_and_resume():
    """The schedule of 60 steps, at most 2 pairs in each; a second router takes over in the middle."""
    router, counts, fired = small(frequency=3.0, max_pairs=2), dict.fromkeys(PAIRS, 0.0), 0
    for number in range(60):
        over = sorted((pair for pair in PAIRS if counts[pair] > 3.0), key=lambda pair: (-counts[pair], pair))
        assert router.due_pairs() == tuple(over[:2])
        assert router.wants_outputs(router.at()) is bool(over)
        fired += len(over[:2])
        step(router, number + 1, shares(number), 128.0)
        router.begin_step()
        for pair, share in zip(PAIRS, shares(number), strict=True):
            counts[pair] = 0.0 if pair in over[:2] else counts[pair] + share / 128.0
        assert router.pair_counts_P.tolist() == list(counts.values())
        if number == 30:
            state, router = router.state_dict(), small(frequency=3.0, max_pairs=2)
            assert router.due_pairs() == ()  # what it has read must not outlive the load
            router.load_state_dict(state)
    assert fired > 20


def test_counts_are_exact_under_autocast():
    """Outside ``forward``, where an engine counts: bfloat16 has no 257."""
    router, experts_TK = small(), torch.tensor([[0, 1]]).expand(257, 2)
    routing = Routing(torch.zeros(257, E), torch.ones(257, 2), experts_TK, {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert router.extra_counts(routing).tolist() == [257.0] + [0.0] * (router.num_pairs - 1)


def test_a_count_must_exceed_the_frequency():
    router = small(frequency=2.0)
    router.pair_counts_P[3] = 2.0
    assert not router.due_pairs()
    router.pair_counts_P[3] += 1e-12
    router.begin_step()
    assert router.due_pairs() == (PAIRS[3],)


def test_who_wants_outputs():
    router = due(small(), (1, 3))
    assert router.wants_outputs(router.at())
    assert not router.wants_outputs(router.at(topk=1))
    assert not router.wants_outputs(Pass(step=0, k=3, training=False))
    assert not due(small(similarity_coeff=0.0), (1, 3)).wants_outputs(router.at())
    assert not small().wants_outputs(router.at())
    assert router.needs_experts


def test_forward_and_combine_leave_the_counts_alone_and_bfloat16_keeps_them():
    router = due(small(), (1, 3)).bfloat16()
    before = router.pair_counts_P.clone()
    assert before.dtype == torch.float64
    routing, _ = run(router, tokens().bfloat16().float())
    assert routing.losses["similarity"].dtype == torch.float32
    assert torch.equal(router.pair_counts_P, before)


def test_the_head_has_a_gradient_of_zero_where_nothing_is_compared():
    for head in ("mlp", "linear"):
        router = small(head=head)
        with torch.no_grad():
            next(part for name, part in router.named_parameters() if name.startswith("head_out_F")).fill_(
                math.inf
            )
        routing = router(tokens())
        assert torch.isfinite(routing.weights_TK).all()
        routing.weights_TK.square().sum().backward()
        parts = {name: part.grad for name, part in router.named_parameters()}
        assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in parts.values())
        assert [name for name, gradient in parts.items() if gradient is not None and gradient.any()] == [
            "weight_ED"
        ]


def test_descending_on_the_loss_makes_twins_unlike():
    router = due(small(), (1, 3))
    experts_TK = torch.tensor([[1, 3]]).expand(T, 2)
    noise_ED = 0.05 * torch.randn(2, D, D, generator=torch.Generator().manual_seed(7))
    experts_EDD = (torch.eye(D) + noise_ED).requires_grad_()
    optimizer = torch.optim.Adam([experts_EDD], lr=0.02)
    values = []
    for _ in range(60):
        outputs_TKD = torch.einsum("td,kdf->tkf", tokens(), experts_EDD)
        routing = Routing(torch.zeros(T, E), torch.full((T, 2), 0.5), experts_TK, {})
        loss = router.combine(routing, tokens(), outputs_TKD, router.at(topk=2)).losses["similarity"]
        values.append(float(loss.detach()) / 0.25)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[0] > 0.9
    assert values[-1] < 0.6


# ------------------------------------------------------------------------------------------ options
def test_options_are_checked_together():
    with pytest.raises(ConfigError) as caught:
        small(min_tokens=20, max_tokens=10)
    assert [problem.field for problem in caught.value.problems] == ["--router.max-tokens"]
    with pytest.raises(ConfigError) as caught:
        small(min_tokens=2, sigma=0.0, threshold=1.5, frequency=0.0, kernel="poly")
    fields = sorted(problem.field for problem in caught.value.problems)
    assert fields == [
        f"--router.{name}" for name in ("frequency", "kernel", "min_tokens", "sigma", "threshold")
    ]


def test_k_of_1_is_warned_about():
    config = SimSMoERouter.Config()
    assert [text.partition(":")[0] for text in config.warnings(topk=1)] == ["router simsmoe with k = 1"] * 2
    assert not list(config.warnings(topk=2))


def test_one_expert_has_no_pairs():
    router = build_router("simsmoe", hidden_size=D, num_experts=1, topk=1)
    assert isinstance(router, SimSMoERouter)
    assert router.num_extra_counts == 0
    assert router.extra_counts(router(tokens())).numel() == 0


def test_options_of_another_kernel_or_head_are_reported() -> None:
    """They are no error: checkpoints of earlier versions have them."""
    router = small(kernel="linear", sigma=0.5, bandwidth="absolute", head="linear", head_width=8)
    assert list(router.config.warnings(topk=2)) == [
        "--router.bandwidth has no effect with --router.kernel linear",
        "--router.sigma has no effect with --router.kernel linear",
        "--router.head-width has no effect with --router.head linear",
    ]
    assert not list(small().config.warnings(topk=2))
