"""The trained linear router."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_hyperrouter import ROUTERS, build_router
from megatron_hyperrouter.config.check import warnings
from megatron_hyperrouter.config.cli import load_file, parse
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.ops.balance import load
from megatron_hyperrouter.ops.jitter import jitter
from megatron_hyperrouter.ops.topk import softmax_topk
from megatron_hyperrouter.routers.base import StepCounts, Tokens
from megatron_hyperrouter.routers.topk import TopKRouter

D, E = 12, 6


def test_initial_weights():
    router = build_router("topk", hidden_size=500, num_experts=32, topk=2, bias=True, init_std=0.3)
    assert float(router.weight_ED.detach().std()) == pytest.approx(0.3, rel=0.05)
    assert not router.bias_E.any()
    assert list(build_router("topk", hidden_size=4, num_experts=2, topk=1).state_dict()) == ["weight_ED"]


def test_logits_are_those_of_a_linear_layer():
    router = build_router("topk", hidden_size=6, num_experts=4, topk=2, bias=True)
    with torch.no_grad():
        router.bias_E.copy_(torch.arange(4.0))
    x_TD = torch.randn(5, 6)
    W, b, x = router.weight_ED.tolist(), router.bias_E.tolist(), x_TD.tolist()
    loops = [[sum(w * v for w, v in zip(W[e], row, strict=True)) + b[e] for e in range(4)] for row in x]
    torch.testing.assert_close(router(x_TD).logits_TE, torch.tensor(loops))


def test_switch_weighs_by_probability():
    router = build_router("topk", hidden_size=6, num_experts=4, topk=1, pre_softmax=True, init_std=1.0)
    routing = router(torch.randn(5, 6))
    weights_TK, experts_TK = softmax_topk(routing.logits_TE, 1)
    assert torch.equal(routing.weights_TK, weights_TK)
    assert torch.equal(routing.experts_TK, experts_TK)
    assert torch.equal(router.fold()(torch.ones(3, 6)).weights_TK, router(torch.ones(3, 6)).weights_TK)


def make(**changes) -> TopKRouter:
    return build_router(
        "topk",
        **{
            "hidden_size": D,
            "num_experts": E,
            "topk": 2,
            "layer_number": 3,
            "seed": 5,
            "init_std": 0.5,
            **changes,
        },
    )


def some(num_tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(seed))


def places(first: int, num_tokens: int, seq_length: int) -> Tokens:
    return Tokens(
        torch.zeros(num_tokens, dtype=torch.int64), torch.arange(first, first + num_tokens), seq_length
    )


def step_counts(router: TopKRouter, load: list[float]) -> StepCounts:
    return StepCounts(
        1,
        sum(load),
        torch.tensor(load, dtype=torch.float64),
        torch.zeros(router.num_extra_counts, dtype=torch.float64),
    )


def aux_loop(probs: list[list[float]], share: list[float]) -> float:
    return E * sum(share[e] * sum(row[e] for row in probs) / len(probs) for e in range(E))


def shares(experts: list[list[int]]) -> list[float]:
    return [sum(row.count(e) for row in experts) / sum(len(row) for row in experts) for e in range(E)]


OPTIONS = {
    "switch": {"pre_softmax": True},
    "renormalised switch": {"pre_softmax": True, "renormalise": True},
    "sigmoid": {"score_function": "sigmoid"},
    "deepseek": {
        "score_function": "sigmoid",
        "renormalise": True,
        "expert_bias": True,
        "bias_update_rate": 0.2,
        "aux_loss": "sequence",
    },
    "biased softmax": {"expert_bias": True},
    "jitter": {"jitter_eps": 0.2, "bias": True},
    "global": {"aux_loss": "global_batch"},
    "frozen": {"freeze": True, "bias": True, "expert_bias": True, "bias_update_rate": 0.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_weights_of_every_option_against_loops(options):
    router = make(**options).eval()
    if router.config.expert_bias:
        router.choice_bias_E.copy_(torch.linspace(0.4, -0.4, E))
    x_TD = some(9)
    routing = router(x_TD)
    W = router.weight_ED.double().tolist()
    for row, weights, experts in zip(
        x_TD.double().tolist(), routing.weights_TK.tolist(), routing.experts_TK.tolist(), strict=True
    ):
        logits = [math.fsum(w * v for w, v in zip(W[e], row, strict=True)) for e in range(E)]
        powers = [math.exp(value) for value in logits]
        sigmoid = router.config.score_function == "sigmoid"
        scores = (
            [1 / (1 + math.exp(-value)) for value in logits]
            if sigmoid
            else [power / sum(powers) for power in powers]
        )
        offered = [s + 0.4 - 0.16 * e for e, s in enumerate(scores)] if router.config.expert_bias else scores
        assert experts == sorted(range(E), key=lambda e: -offered[e])[:2]
        raw = [scores[e] for e in experts]
        plain = options.keys() & {"pre_softmax", "score_function"} and not options.get("renormalise")
        assert weights == pytest.approx(raw if plain else [value / sum(raw) for value in raw], abs=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_resumed_and_folded_routers_do_the_same_in_training(options):
    router = make(aux_loss_coeff=0.1, z_loss_coeff=0.1, **options)
    router.end_step(step_counts(router, [9.0, 1.0, 2.0, 6.0, 0.0, 0.0]))
    fresh = make(aux_loss_coeff=0.1, z_loss_coeff=0.1, seed=5, **options)
    fresh.load_state_dict(router.state_dict(), strict=True)
    for other in (
        fresh,
        router.fold(),
        make(aux_loss_coeff=0.1, z_loss_coeff=0.1, **options).bfloat16().float(),
    ):
        if other is not fresh:
            other.load_state_dict(router.state_dict(), strict=True)
        for training in (True, False):
            arguments = {"step": 7, "tokens": places(16, 8, 4)}
            left, right = (
                router.train(training)(some(8), **arguments),
                other.train(training)(some(8), **arguments),
            )
            assert all(torch.equal(a, b) for a, b in zip(left[:3], right[:3], strict=True))
            assert all(torch.equal(left.losses[key], right.losses[key]) for key in ("aux", "z"))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_permuted_experts_change_the_order_alone(options):
    router, other = make(aux_loss_coeff=0.1, **options), make(aux_loss_coeff=0.1, **options)
    router.end_step(step_counts(router, [9.0, 1.0, 2.0, 6.0, 0.0, 0.0]))
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    other.load_state_dict({key: tensor[order] for key, tensor in router.state_dict().items()})
    left, right = router(some(8), tokens=places(0, 8, 4)), other(some(8), tokens=places(0, 8, 4))
    assert torch.equal(order[right.experts_TK], left.experts_TK)
    torch.testing.assert_close(right.weights_TK, left.weights_TK)
    torch.testing.assert_close(right.losses["aux"], left.losses["aux"])


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", ["micro_batch", "sequence", "global_batch"])
def test_auxiliary_losses_against_loops(kind, score_function):
    router = make(aux_loss=kind, score_function=score_function, aux_loss_coeff=0.5)
    load = [9.0, 1.0, 2.0, 6.0, 0.0, 0.0]
    router.end_step(step_counts(router, load))
    routing = router(some(8), tokens=places(16, 8, 4))
    logits, experts = routing.logits_TE.double().tolist(), routing.experts_TK.tolist()
    powers = [
        [math.exp(g) if score_function == "softmax" else 1 / (1 + math.exp(-g)) for g in row]
        for row in logits
    ]
    probs = [[power / sum(row) for power in row] for row in powers]
    if kind == "sequence":
        expected = (
            sum(aux_loop(probs[first : first + 4], shares(experts[first : first + 4])) for first in (0, 4))
            / 2
        )
    else:
        expected = aux_loop(
            probs, shares(experts) if kind == "micro_batch" else [value / 18 for value in load]
        )
    assert float(routing.losses["aux"]) == pytest.approx(0.5 * expected, rel=1e-5)


def test_global_balance_starts_uniform_and_pushes_against_the_last_load():
    router = make(aux_loss="global_batch", aux_loss_coeff=1.0)
    assert float(router(some(8)).losses["aux"]) == pytest.approx(1.0)
    router.end_step(step_counts(router, [0.0, 18.0, 0.0, 0.0, 0.0, 0.0]))
    routing = router(some(8))
    (gradient_TE,) = torch.autograd.grad(routing.losses["aux"], routing.logits_TE)
    assert (gradient_TE[:, 1] > 0).all()  # a step against it lowers the logit of the expert that had all
    assert (gradient_TE[:, [0, 2, 3, 4, 5]] < 0).all()


def test_expert_bias_evens_the_load_out_and_no_weight_moves():
    """With the router's weights fixed, the sign rule alone balances what a skewed router chose."""
    router = make(expert_bias=True, bias_update_rate=0.002, bias=True)
    with torch.no_grad():
        router.bias_E[0] = 3.0
    x_TD, loads = some(600), []
    before = router.weight_ED.clone()
    for _ in range(600):
        load_E = load(router(x_TD).experts_TK, E)
        loads.append(float(load_E.max() / load_E.double().mean()))
        router.end_step(step_counts(router, load_E.double().tolist()))
    assert loads[0] > 2.5
    assert max(loads[-5:]) < 1.2
    assert torch.equal(before, router.weight_ED)
    evaluated = router.choice_bias_E.clone()
    router.eval()(x_TD)
    assert torch.equal(evaluated, router.choice_bias_E)


def test_expert_bias_follows_the_sign_rule_step_by_step():
    router = make(expert_bias=True)  # the paper's rate
    router.end_step(step_counts(router, [4.0, 2.0, 3.0, 3.0, 6.0, 0.0]))
    router.end_step(step_counts(router, [4.0, 4.0, 2.0, 2.0, 3.0, 3.0]))
    assert router.choice_bias_E.tolist() == pytest.approx([-0.002, 0.0, 0.001, 0.001, -0.001, 0.001])


def test_jitter_is_a_function_of_the_place_and_of_training():
    router = make(jitter_eps=0.3)
    x_TD = some(8)
    whole = router(x_TD, step=4, tokens=places(0, 8, 4)).logits_TE
    parts = [
        router(x_TD[rows], step=4, tokens=places(rows.start, 4, 4)).logits_TE
        for rows in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
    noisy_TD = x_TD * jitter(torch.arange(8), D, 0.3, seed=5, step=4, layer=3)
    torch.testing.assert_close(whole, noisy_TD @ router.weight_ED.T)
    torch.testing.assert_close(router(x_TD, step=4).logits_TE, whole)  # without places they count from 0
    assert not torch.allclose(router(x_TD, step=5, tokens=places(0, 8, 4)).logits_TE, whole)
    torch.testing.assert_close(
        router.eval()(x_TD, step=4, tokens=places(0, 8, 4)).logits_TE, x_TD @ router.weight_ED.T
    )


def test_jitter_survives_recomputation_compilation_and_bfloat16():
    router, x_TD = make(jitter_eps=0.3), some(8)
    expected = router(x_TD.bfloat16().float(), step=2)
    assert torch.equal(router(x_TD.bfloat16(), step=2).logits_TE, expected.logits_TE)
    torch._dynamo.reset()
    compiled = torch.compile(router, backend="aot_eager")(x_TD.bfloat16(), step=2)
    torch.testing.assert_close(compiled.logits_TE, expected.logits_TE)
    x_TD.requires_grad_()
    total = torch.tensor([1.0, 2.0])
    (plain_TD,) = torch.autograd.grad((router(x_TD, step=2).weights_TK * total).sum(), x_TD)
    again_TK = checkpoint(lambda x: router(x, step=2).weights_TK, x_TD, use_reentrant=False)
    (again_TD,) = torch.autograd.grad((again_TK * total).sum(), x_TD)
    assert torch.equal(plain_TD, again_TD)


def test_a_frozen_router_is_saved_but_not_trained():
    router, trained = make(freeze=True, bias=True), make(bias=True)
    assert not any(parameter.requires_grad for parameter in router.parameters())
    assert list(router.state_dict()) == ["weight_ED", "bias_E"]
    assert torch.equal(router.weight_ED, trained.weight_ED)
    x_TD = some(4).requires_grad_()
    router(x_TD).weights_TK[:, 0].sum().backward()
    assert x_TD.grad.any(1).all()
    assert not any(parameter.requires_grad for parameter in router.fold().parameters())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"pre_softmax": True, "score_function": "sigmoid"}, "--router.pre-softmax"),
        ({"renormalise": True}, "--router.renormalise"),
        ({"bias_update_rate": 0.1}, "--router.bias-update-rate"),
        ({"freeze": True, "expert_bias": True}, "--router.freeze"),
    ],
)
def test_options_that_contradict_are_refused(options, field):
    with pytest.raises(ConfigError) as caught:
        make(**options)
    (problem,) = caught.value.problems
    assert problem.field == field
    assert problem.remedy


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({}, True),
        ({"pre_softmax": True}, False),
        ({"pre_softmax": True, "renormalise": True}, True),
        ({"score_function": "sigmoid"}, False),
        ({"score_function": "sigmoid", "renormalise": True}, True),
    ],
)
def test_k1_warns_exactly_where_the_weight_is_one(options, warns):
    router = make(topk=1, **options)
    assert bool(list(router.config.warnings(topk=1))) == warns
    router(some(10)).weights_TK.sum().backward()
    assert router.weight_ED.grad.any() != warns
    assert not list(make(topk=1, freeze=True, **options).config.warnings(topk=1))


def test_options_come_as_flags_and_from_yaml(tmp_path):
    flags = (
        "--router.score-function sigmoid --router.renormalise --router.expert-bias "
        "--router.bias-update-rate 0.01"
    )
    argv = [
        "--data-path",
        "corpus",
        "--router.name",
        "topk",
        *flags.split(),
        "--router.aux-loss",
        "sequence",
        "--router.no-freeze",
    ]
    options = parse(argv, routers=ROUTERS).router.options
    expected = TopKRouter.Config(
        score_function="sigmoid",
        renormalise=True,
        expert_bias=True,
        bias_update_rate=0.01,
        aux_loss="sequence",
    )
    assert options == expected
    file = tmp_path / "run.yaml"
    file.write_text(
        "data_path: corpus\nrouter: {name: topk, jitter_eps: 0.01, aux_loss: global_batch, freeze: yes, "
        "bias_update_rate: none}\n"
    )
    config = load_file(file, routers=ROUTERS)
    assert config.router.options == TopKRouter.Config(jitter_eps=0.01, aux_loss="global_batch", freeze=True)
    with pytest.raises(ConfigError, match=r"--router\.renormalise = True: has no effect"):
        parse(["--data-path", "corpus", "--router.name", "topk", "--router.renormalise"], routers=ROUTERS)


@pytest.mark.parametrize("kind", ["micro_batch", "global_batch", "sequence"])
@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_warning_where_the_chosen_loss_is_multiplied_by_zero(kind, coefficient):
    words = (
        f"--data-path a --router.name topk --router.aux-loss {kind} --moe-aux-loss-coeff {coefficient} "
        "--eval-interval 0"
    )
    told = warnings(parse(words.split(), routers=ROUTERS, world_size=1))
    assert len(told) == (kind != "micro_batch" and not coefficient)
    assert all(f"--router.aux-loss {kind} has no effect" in line for line in told)


def test_a_learning_rate_of_a_frozen_router_is_reported():
    assert "--router.lr-mult has no effect" in next(
        iter(TopKRouter.Config(freeze=True, lr_mult=2.0).warnings(topk=2))
    )
    assert not list(TopKRouter.Config(freeze=True).warnings(topk=1))
    assert list(TopKRouter.Config().warnings(topk=1))
