"""CompeteSMoE: competing passes against loops in float64, their gradients, who competes when, and what
ordinary passes are.
"""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_hyperrouter import ROUTERS, build_router
from megatron_hyperrouter.config.check import warnings
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.ops.balance import switch_loss, z_loss
from megatron_hyperrouter.ops.coin import shared_coin
from megatron_hyperrouter.ops.competition import WINDOW, Capped, planned
from megatron_hyperrouter.routers import RunFacts

T, D, E, K = 9, 6, 5, 2
ALWAYS = {"v1": {"schedule": "fixed", "rate": 1.0}, "v2": {"rate": 1.0, "warm_up": 0.0, "max_competing": 3}}


class Experts(nn.Module):
    """E small experts on this rank, as a bank and for training."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.first_EDD = nn.Parameter(scale * torch.randn(E, D, D, generator=draw))
        self.second_EDD = nn.Parameter(torch.randn(E, D, D, generator=draw) / D)
        self.asked = 0

    def outputs_TED(self, x_TD: Tensor) -> Tensor:
        return torch.einsum(
            "ted,edf->tef", torch.einsum("td,edf->tef", x_TD, self.first_EDD).tanh(), self.second_EDD
        )

    @torch.no_grad()
    def scores_TE(self, x_TD: Tensor, score) -> Tensor:
        self.asked += 1
        return score(self.outputs_TED(x_TD))


def small(version="v2", **changes):
    sizes = {
        "hidden_size": D,
        "num_experts": E,
        "topk": K,
        "layer_number": 1,
        "seed": 5,
        "init_std": 0.7,
        **ALWAYS[version],
    }
    return build_router("competesmoe", version=version, **{**sizes, **changes})


def numbers(seed: int = 2, rows: int = T) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))


def run_layer(router, experts, x_TD, *, step=0, topk=None):
    """What an engine does with one micro-batch: (routing, layer's output)."""
    now = router.at(step=step, topk=topk, experts=experts)
    routing = router(x_TD, step=step, topk=topk, experts=experts)
    outputs_TKD = experts.outputs_TED(x_TD).gather(1, routing.experts_TK.unsqueeze(-1).expand(-1, -1, D))
    if router.wants_outputs(now):
        routing = router.combine(routing, x_TD, outputs_TKD, now)
    return routing, (routing.weights_TK.unsqueeze(-1) * outputs_TKD).sum(1)


def looped(router, experts, x_TD, settings, k=K):
    """(weights, ids, loss of each name, output) of a competing pass, token by token and expert by expert,
    in float64.
    """
    W, outs = router.weight_ED.double(), Experts.outputs_TED(experts, x_TD)
    version, count = router.config.version, x_TD.size(0)
    weights, ids, outputs, all_probs, losses = [], [], [], [], {}

    def add(name, value):
        losses[name] = losses.get(name, 0.0) + settings[name] * value / count

    for t in range(count):
        g = torch.stack([W[i] @ x_TD[t] for i in range(E)])
        if version == "v1":
            s = [outs[t, i].square().sum().sqrt() for i in range(E)]
        else:
            s = [sum((1 + outs[t, i, d].exp()).log() for d in range(D)) / D for i in range(E)]
        winners = sorted(range(E), key=lambda i: (-float(s[i]), i))[:k]
        total = sum(s[i].exp() if version == "v1" else s[i] for i in winners)
        w = [(s[i].exp() if version == "v1" else s[i]) / total for i in winners]
        probs = g.exp() / g.exp().sum()
        constant = [value.detach() for value in s]
        if version == "v1":
            below = sum(constant[i].exp() for i in winners)
            target = [constant[i].exp() / below if i in winners else torch.zeros(()) for i in range(E)]
            if router.config.loss == "kl":
                add("competition", sum(target[i] * (target[i] / probs[i]).log() for i in winners))
            else:
                add("competition", sum((probs[i] - target[i]) ** 2 for i in range(E)) / E)
        else:
            below = sum(value.exp() for value in constant)
            squares = [(probs[i] - constant[i].exp() / below) ** 2 for i in range(E)]
            add("competition", sum(squares) / E + router.config.theta * sum(squares[i] for i in winners) / k)
        for i in winners:
            for j in winners:
                if i != j and settings["diversity"]:
                    cosine = outs[t, i] @ outs[t, j] / (outs[t, i].norm() * outs[t, j].norm())
                    add("diversity", cosine / k**2)
        # losers' outputs are never sent
        mixed = [s[i] if i in winners else constant[i] for i in range(E)]
        below = sum(value.exp() for value in mixed)
        all_probs.append([value.exp() / below for value in mixed])
        weights.append(torch.stack(w))
        ids.append(winners)
        outputs.append(sum(w[n] * outs[t, i] for n, i in enumerate(winners)))
    if settings["competition_balance"]:
        for i in range(E):
            share = sum(i in winners for winners in ids) / (count * k)
            mean = sum(row[i] for row in all_probs) / count
            losses["competition_balance"] = (
                losses.get("competition_balance", 0.0) + settings["competition_balance"] * E * share * mean
            )
    return torch.stack(weights), ids, losses, torch.stack(outputs)


@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize(
    ("version", "options", "coefficients"),
    [
        ("v1", {}, (0.05, 0.0, 0.0)),
        (
            "v1",
            {"loss": "kl", "router_coeff": 0.5, "balance_coeff": 0.25, "diversity_coeff": 2.0},
            (0.5, 2.0, 0.25),
        ),
        ("v2", {}, (0.01, 0.01, 0.01)),
        (
            "v2",
            {"theta": 3.0, "router_coeff": 4.0, "balance_coeff": 0.5, "diversity_coeff": 2.0},
            (4.0, 2.0, 0.5),
        ),
    ],
)
def test_a_competing_pass_against_loops(version, options, coefficients, k):
    router, experts = small(version, **options), Experts()
    settings = dict(zip(("competition", "diversity", "competition_balance"), coefficients, strict=True))
    x_TD = numbers().requires_grad_()
    routing, output_TD = run_layer(router, experts, x_TD, topk=k)
    twin, x64_TD = copy.deepcopy(experts).double(), x_TD.detach().double().requires_grad_()
    weights_TK, ids, losses, expected_TD = looped(copy.deepcopy(router).double(), twin, x64_TD, settings, k)
    assert routing.experts_TK.tolist() == ids
    torch.testing.assert_close(routing.weights_TK.double(), weights_TK, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output_TD.double(), expected_TD, rtol=1e-5, atol=1e-5)
    assert set(routing.losses) == {name for name, value in settings.items() if value}
    for name, value in routing.losses.items():
        assert float(value) == pytest.approx(float(losses.get(name, 0.0)), rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_gradients_of_router_experts_and_input_against_loops(version):
    """The router learns from the target alone; the winners learn through weights, diversity and balance."""
    router, experts = small(version, router_coeff=2.0, balance_coeff=0.5, diversity_coeff=0.7), Experts()
    settings = {"competition": 2.0, "diversity": 0.7, "competition_balance": 0.5}
    aim_TD, x_TD = numbers(3), numbers().requires_grad_()
    routing, output_TD = run_layer(router, experts, x_TD)
    ((output_TD * aim_TD).sum() + sum(routing.losses.values())).backward()
    router64, twin = copy.deepcopy(router).double(), copy.deepcopy(experts).double()
    x64_TD = x_TD.detach().double().requires_grad_()
    _, _, losses, expected_TD = looped(router64, twin, x64_TD, settings)
    wanted = (x64_TD, router64.weight_ED, twin.first_EDD, twin.second_EDD)
    expected = torch.autograd.grad((expected_TD * aim_TD).sum() + sum(losses.values()), wanted)
    found = (x_TD.grad, router.weight_ED.grad, experts.first_EDD.grad, experts.second_EDD.grad)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_target_moves_the_router_towards_the_winners_and_trains_no_expert(version):
    router, experts = small(version, router_coeff=1.0), Experts()
    x_TD = numbers(rows=200)
    first = router(x_TD, experts=experts)
    (gradient_ED,) = torch.autograd.grad(first.losses["competition"], [router.weight_ED])
    assert torch.autograd.grad(
        router(x_TD, experts=experts).losses["competition"], list(experts.parameters()), allow_unused=True
    ) == (
        None,
        None,
    )
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(60):
        loss = router(x_TD, experts=experts).losses["competition"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert gradient_ED.abs().max() > 0
    assert float(loss) < 0.8 * float(first.losses["competition"])


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_permuting_experts_with_router_rows_changes_nothing_but_the_order(version):
    router, experts, x_TD = small(version), Experts(), numbers()
    routing, output_TD = run_layer(router, experts, x_TD)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        for parameter in (router.weight_ED, experts.first_EDD, experts.second_EDD):
            parameter.copy_(parameter[order])
    moved, moved_TD = run_layer(router, experts, x_TD)
    assert torch.equal(order[moved.experts_TK], routing.experts_TK)
    torch.testing.assert_close(moved_TD, output_TD)
    for name, value in routing.losses.items():
        torch.testing.assert_close(moved.losses[name], value)


class Shards:
    """Two ranks that share a micro-batch: the first run records what each puts in, the second hands out
    the sums.
    """

    def __init__(self) -> None:
        self.given = {0: [], 1: []}
        self.rank, self.call = 0, None

    def over(self, values: Tensor) -> Tensor:
        if self.call is None:
            self.given[self.rank].append(values.detach().clone())
            return values
        self.call += 1
        return self.given[0][self.call - 1] + self.given[1][self.call - 1]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_parts_of_a_micro_batch_add_up_to_the_whole(version):
    experts, x_TD = Experts(), numbers()
    options = {"balance_coeff": 0.5, "diversity_coeff": 0.7}
    whole, _ = run_layer(small(version, **options), experts, x_TD)
    router, shards, parts = small(version, **options), Shards(), []
    router.over_shards = shards.over
    for call in (None, 0):
        for shards.rank, rows in enumerate((x_TD[:3], x_TD[3:])):
            shards.call = call
            parts.append(run_layer(router, experts, rows)[0])
    for name, value in whole.losses.items():
        torch.testing.assert_close(parts[2].losses[name] + parts[3].losses[name], value)


@pytest.mark.parametrize(
    "options",
    [{}, {"version": "v1"}, {"version": "v1", "schedule": "function", "block_steps": 50}],
    ids=["capped", "fixed", "function"],
)
def test_ordinary_passes_are_those_of_a_plain_router(options):
    """Outside competitions, in evaluation and without a bank: top-k of the logits, aux and z."""
    common = {
        "hidden_size": D,
        "num_experts": E,
        "topk": K,
        "seed": 5,
        "init_std": 0.7,
        "aux_loss_coeff": 0.1,
        "z_loss_coeff": 0.2,
    }
    facts, experts, x_TD = RunFacts(num_layers=2, train_iters=400), Experts(), numbers()
    router, plain = (
        build_router("competesmoe", facts=facts, **options, **common),
        build_router("topk", **common),
    )
    competing = 0
    for step in range(0, 400, 3):
        now = router.at(step=step, experts=experts)
        asked = experts.asked
        routing = router(x_TD, step=step, experts=experts)
        if router.wants_outputs(now):
            competing += 1
            assert experts.asked == asked + 1
            assert {"aux", "z"}.isdisjoint(routing.losses)
        else:
            assert experts.asked == asked
            assert all(torch.equal(a, b) for a, b in zip(routing[:3], plain(x_TD)[:3], strict=True))
            assert routing.losses == plain(x_TD).losses
        assert router(x_TD, step=step).losses.keys() == {"aux", "z"}
    assert 0 < competing < 134
    router.eval()
    asked = experts.asked
    for step in range(400):
        assert not router.wants_outputs(router.at(step=step, experts=experts))
    routing = router(x_TD, step=399, experts=experts)
    assert experts.asked == asked
    torch.testing.assert_close(
        routing.losses["aux"], 0.1 * switch_loss(routing.logits_TE.softmax(-1), routing.experts_TK)
    )
    torch.testing.assert_close(routing.losses["z"], 0.2 * z_loss(routing.logits_TE))


def test_who_competes_when():
    """The three schedules against their rules; layers of a model agree on one plan."""
    facts, sizes = (
        RunFacts(num_layers=6, train_iters=1000),
        {"hidden_size": D, "num_experts": E, "topk": K, "seed": 9},
    )
    layers = range(1, 7)
    make = partial(build_router, "competesmoe", facts=facts, **sizes)
    capped = [make(layer_number=layer, rate=0.3, max_competing=2, warm_up=0.1) for layer in layers]
    plan = Capped(seed=9, rate=0.3, warm_up=100, num_layers=6, max_competing=2)
    for step in range(1500):
        row = [router.competes(step) for router in capped]
        assert row == [plan.competes(step=step, layer=layer) for layer in layers]
        assert sum(row) <= (2 if step >= 100 else 0)
    fixed, function = (
        make(layer_number=2, version="v1", rate=0.25),
        make(layer_number=2, version="v1", schedule="function", block_steps=10),
    )
    for step in range(300):
        assert fixed.competes(step) == (shared_coin(seed=9, step=step, layer=2) < 0.25)
        assert function.competes(step) == (
            shared_coin(seed=9, step=step // 10, layer=2) < 2 / (2 + math.sqrt(step // 10 + 1))
        )


def test_a_longer_run_begins_as_the_shorter_one_did():
    make = partial(build_router, "competesmoe", hidden_size=D, num_experts=E, topk=K, rate=0.2, warm_up=0.0)
    short, long = (make(facts=RunFacts(num_layers=8, train_iters=iters)) for iters in (100, 5000))
    steps = [step for step in range(600) if short.competes(step)]
    assert 0 < len(steps) < 600
    assert steps == [step for step in range(600) if long.competes(step)]


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputing_a_competing_layer_gives_the_same_gradients(version, reentrant):
    router, experts, results = small(version), Experts(), []
    for recompute in (False, True):
        router.zero_grad()
        experts.zero_grad()
        x_TD = numbers().requires_grad_()

        def layer(x_TD):
            routing, output_TD = run_layer(router, experts, x_TD)
            return output_TD.square().sum() + sum(routing.losses.values())

        (checkpoint(layer, x_TD, use_reentrant=reentrant) if recompute else layer(x_TD)).backward()
        results.append(
            [
                x_TD.grad,
                *(parameter.grad for module in (router, experts) for parameter in module.parameters()),
            ]
        )
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_bfloat16_tokens_outputs_and_module(version):
    experts, x_TD = Experts(), numbers().bfloat16()
    router, exact = small(version).bfloat16(), small(version)
    with torch.no_grad():
        exact.weight_ED.copy_(router.weight_ED)
    bank = Experts()
    bank.scores_TE = lambda rows_TD, score: experts.scores_TE(rows_TD.float(), score)
    now, routing = router.at(experts=bank), router(x_TD, experts=bank)
    outputs_TKD = (
        experts.outputs_TED(x_TD.float())
        .gather(1, routing.experts_TK.unsqueeze(-1).expand(-1, -1, D))
        .bfloat16()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = router.combine(routing, x_TD, outputs_TKD, now)
    expected = exact.combine(exact(x_TD.float(), experts=bank), x_TD.float(), outputs_TKD.float(), now)
    assert found.weights_TK.dtype == torch.float32
    assert torch.equal(found.weights_TK, expected.weights_TK)
    assert found.losses == expected.losses


def test_nothing_is_left_behind_by_a_competing_pass():
    router, experts = small(), Experts()
    before = list(router.state_dict())
    routing, _ = run_layer(router, experts, numbers().requires_grad_())
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert torch.equal(run_layer(twin, experts, numbers())[0].weights_TK, routing.weights_TK)
    assert list(router.state_dict()) == before == ["weight_ED"]


def test_a_resumed_router_goes_on_as_the_first():
    """Weights and steps are all there is: nothing of the plan needs saving."""
    experts = Experts()

    def train(router, optimizer, steps):
        ids = []
        for step in steps:
            routing, output_TD = run_layer(router, experts, numbers(step), step=step)
            optimizer.zero_grad()
            (output_TD.square().sum() + sum(routing.losses.values())).backward()
            optimizer.step()
            ids.append(routing.experts_TK.tolist())
        return ids

    options = {"rate": 0.5, "aux_loss_coeff": 0.1}
    first, again = small(**options), small(**options)
    optimizer, other = (torch.optim.SGD(router.parameters(), lr=0.1) for router in (first, again))
    train(first, optimizer, range(7))
    again.load_state_dict(first.state_dict())
    assert 0 < sum(first.competes(step) for step in range(7, 20)) < 13
    assert train(first, optimizer, range(7, 20)) == train(again, other, range(7, 20))
    assert torch.equal(first.weight_ED, again.weight_ED)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"loss": "kl"}, "--router.loss"),
        ({"version": "v1", "theta": 0.5}, "--router.theta"),
        ({"version": "v1", "warm_up": 0.5}, "--router.warm-up"),
        ({"schedule": "fixed", "max_competing": 1}, "--router.max-competing"),
        ({"block_steps": 10}, "--router.block-steps"),
        ({"schedule": "function", "rate": 0.5}, "--router.rate"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, field):
    with pytest.raises(ConfigError, match="has no effect with") as caught:
        build_router("competesmoe", hidden_size=D, num_experts=E, topk=K, **options)
    assert [problem.field for problem in caught.value.problems] == [field]


def test_warnings():
    make = partial(build_router, "competesmoe", hidden_size=D, num_experts=E, topk=K)
    assert not list(make().config.warnings(topk=2))
    assert "k = 1" in next(make().config.warnings(topk=1))
    assert "no layer competes" in next(make(rate=0.0).config.warnings(topk=2))


@pytest.mark.parametrize(
    ("layers", "rate", "warns"),
    [(8, 0.5, True), (8, 0.375, False), (7, 0.4, False), (60, 0.07, True), (3, 1.0, False)],
)
def test_warning_where_the_cap_cuts_the_rate(layers, rate, warns):
    """Where it warns, steps are full from end to end, and the rate that it tells is the plan's own."""
    told = list(small(rate=rate).config.lost(num_layers=layers, aux_loss_coeff=0.0))
    assert len(told) == warns
    plan = planned(Capped(5, rate, warm_up=0, num_layers=layers, max_competing=3), 0)
    real = sum(map(len, plan)) / WINDOW / layers
    assert real <= 3 / layers
    assert not warns or f"limits the rate to {3 / layers:.3g}" in told[0]
    assert (rate > 3 / layers) == warns
    if warns:
        assert real == pytest.approx(3 / layers, rel=0.05)


def test_only_a_capped_schedule_has_a_cap():
    fixed = build_router(
        "competesmoe", hidden_size=D, num_experts=E, topk=K, schedule="fixed", rate=1.0
    ).config
    assert not list(fixed.lost(num_layers=60, aux_loss_coeff=0.0))


def test_the_settings_of_a_run_are_checked_against_the_cap():
    words = "--data-path a --router.name competesmoe --router.rate 0.9 --eval-interval 0 --num-layers"
    few, many = (
        warnings(parse([*words.split(), str(layers)], routers=ROUTERS, world_size=1)) for layers in (3, 4)
    )
    assert not few
    assert len(many) == 1 and "3.6 competing layers in each step" in many[0]


def test_layers_that_do_not_know_the_model_plan_once_each():
    """Without facts each layer counts itself and those before it: 24 plans, none of which pushes another
    out.
    """
    planned.cache_clear()
    routers = [
        build_router("competesmoe", hidden_size=D, num_experts=E, topk=2, layer_number=number)
        for number in range(1, 25)
    ]
    for step in (60, 61):
        assert len([router.competes(step) for router in routers]) == 24
    assert planned.cache_info().misses == 24
