"""Cosine routing, against plain-Python loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_hyperrouter import ROUTERS, build_router
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.routers.xmoe import XMoERouter

D, E = 10, 6
FORMS = {
    "paper": {},
    "sigmoid": {"score_function": "sigmoid"},
    "renormalised": {"renormalise": True, "projection_size": 4},
    "published": {"normalize_input": False},
    "published sigmoid": {"normalize_input": False, "score_function": "sigmoid", "renormalise": True},
}


def make(**changes) -> XMoERouter:
    router = build_router(
        "xmoe", **{"hidden_size": D, "num_experts": E, "topk": 2, "layer_number": 2, "seed": 4, **changes}
    )
    with torch.no_grad():
        router.log_temperature.fill_(0.4)  # as after some training
    return router


def some(num_tokens: int = 9, **options) -> torch.Tensor:
    return torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(1), **options)


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(math.fsum(value * value for value in vector))
    return [value / length for value in vector]


def dot(left: list[float], right: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(left, right, strict=True))


def loop_scores(router: XMoERouter, x_TD: torch.Tensor) -> list[list[float]]:
    """s of each token, from the paper's equation."""
    A, embeddings = router.projection_PD.double().tolist(), router.embedding_EP.double().tolist()
    scores = []
    for x in x_TD.double().tolist():
        point = [dot(row, x) for row in A]
        point = unit(point) if router.config.normalize_input else point
        scores.append([dot(point, unit(embedding)) for embedding in embeddings])
    return scores


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / math.fsum(powers) for power in powers]


@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("form", FORMS)
def test_logits_weights_and_losses_against_loops(form, k):
    router = make(topk=k, aux_loss_coeff=0.5, z_loss_coeff=0.25, **FORMS[form])
    routing, config = router(some()), router.config
    tau0 = 0.3 if config.score_function == "softmax" else 0.07
    tau = tau0 * math.exp(0.4)
    balance, z = [], 0.0
    for s, g, w, ids in zip(
        loop_scores(router, some()), *(part.tolist() for part in routing[:3]), strict=True
    ):
        logits = [value / tau for value in s]
        assert g == pytest.approx(logits, rel=1e-5, abs=1e-5)
        assert ids == sorted(range(E), key=lambda e: -logits[e])[:k]
        gate = (
            softmax(logits)
            if config.score_function == "softmax"
            else [1 / (1 + math.exp(-value)) for value in logits]
        )
        total = sum(gate[e] for e in ids) if config.renormalise else 1.0
        assert w == pytest.approx([gate[e] / total for e in ids], rel=1e-4, abs=1e-6)
        balance.append(softmax([value / tau0 for value in s]))
        z += math.log(math.fsum(math.exp(value) for value in logits)) ** 2 / 9
    chosen = routing.experts_TK.flatten().tolist()
    aux = E * sum(chosen.count(e) / len(chosen) * sum(row[e] for row in balance) / 9 for e in range(E))
    assert float(routing.losses["aux"]) == pytest.approx(0.5 * aux, rel=1e-5)
    assert float(routing.losses["z"]) == pytest.approx(0.25 * z, rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_against_finite_differences(form):
    """Gradients of all trained tensors and of the tokens, computed in float64."""
    router, seen = make(aux_loss_coeff=0.3, **FORMS[form]), some(4)
    chosen_TK = router(seen).experts_TK
    names = ["projection_PD", "embedding_EP", "log_temperature"]
    weights_TK = torch.linspace(0.5, 2.0, 8).view(4, 2)

    def value(tensors: dict[str, torch.Tensor], x_TD: torch.Tensor) -> torch.Tensor:
        config = router.config
        tau0 = 0.3 if config.score_function == "softmax" else 0.07
        point = x_TD @ tensors["projection_PD"].T
        point = point / point.norm(dim=1, keepdim=True) if config.normalize_input else point
        s = point @ (tensors["embedding_EP"] / tensors["embedding_EP"].norm(dim=1, keepdim=True)).T
        g = s / (tau0 * tensors["log_temperature"].exp())
        gate = g.softmax(1) if config.score_function == "softmax" else g.sigmoid()
        kept = gate.gather(1, chosen_TK)
        kept = kept / kept.sum(1, keepdim=True) if config.renormalise else kept
        share = torch.stack([(chosen_TK == e).double().mean() for e in range(E)])
        return (kept * weights_TK.double()).sum() + 0.3 * E * (share * (s / tau0).softmax(1).mean(0)).sum()

    exact = {name: router.get_parameter(name).detach().double().requires_grad_() for name in names}
    x_TD = seen.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *inputs: value(dict(zip(names, inputs[:-1], strict=True)), inputs[-1]), (*exact.values(), x_TD)
    )
    expected = torch.autograd.grad(value(exact, x_TD), [*exact.values(), x_TD])
    seen.requires_grad_()
    routing = router(seen)
    found = torch.autograd.grad(
        (routing.weights_TK * weights_TK).sum() + routing.losses["aux"], [*router.parameters(), seen]
    )
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left.double(), right, rtol=1e-4, atol=1e-5)


def test_cosines_forget_lengths_and_the_published_variant_does_not():
    paper, published = make(), make(normalize_input=False)
    scaled_TD = some() * torch.linspace(0.1, 9.0, 9)[:, None]
    torch.testing.assert_close(paper(scaled_TD).logits_TE, paper(some()).logits_TE)
    assert not torch.allclose(published(scaled_TD).logits_TE, published(some()).logits_TE)
    with torch.no_grad():
        for router in (paper, published):
            before = router(some()).logits_TE
            router.embedding_EP.mul_(7.0)
            torch.testing.assert_close(router(some()).logits_TE, before)
    largest = paper(some(200)).logits_TE.abs().max() * paper.temperature()
    assert float(largest) <= 1 + 1e-6


def test_the_temperature_stays_positive_and_learns():
    router = make(topk=1)
    optimizer = torch.optim.SGD([router.log_temperature], lr=0.1)
    before = float(router.temperature())
    (-router(some()).weights_TK.sum()).backward()  # surer choices ask for a lower one
    optimizer.step()
    assert 0 < float(router.temperature()) < before
    with torch.no_grad():
        for value in (-60.0, 60.0):
            router.log_temperature.fill_(value)
            assert float(router.temperature()) > 0
            assert torch.isfinite(router(some()).weights_TK).all()
    for form, tau in (({}, 0.3), ({"score_function": "sigmoid"}, 0.07), ({"init_temperature": 0.5}, 0.5)):
        fresh = build_router("xmoe", hidden_size=D, num_experts=E, topk=1, **form)
        assert float(fresh.temperature()) == pytest.approx(tau)


def test_the_balance_loss_leaves_the_temperature_alone():
    router = make(aux_loss_coeff=1.0)
    router(some()).losses["aux"].backward()
    assert float(router.log_temperature.grad.abs()) < 1e-6
    assert float(router.embedding_EP.grad.abs().max()) > 1e-3


def test_tokens_and_embeddings_of_zeros_have_cosine_zero_and_finite_gradients():
    router = make()
    with torch.no_grad():
        router.embedding_EP[2] = 0.0
    x_TD = some(3).index_fill(0, torch.tensor([1]), 0.0).requires_grad_()
    routing = router(x_TD)
    assert not routing.logits_TE[1].any()
    assert not routing.logits_TE[:, 2].any()
    routing.weights_TK[:, 0].sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in (x_TD, *router.parameters()))


@pytest.mark.parametrize("form", [name for name, options in FORMS.items() if "normalize_input" in options])
@pytest.mark.parametrize("k", [1, 3])
def test_the_published_variant_folds_with_its_temperature(form, k):
    router = make(topk=k, **FORMS[form])
    plain = router.fold()
    assert plain.name == "topk"
    left, right = router(some()), plain(some())
    assert all(torch.equal(one, other) for one, other in zip(left[:3], right[:3], strict=True))
    with torch.no_grad():
        router.log_temperature.add_(1.0)
    assert not torch.equal(router(some()).weights_TK, plain(some()).weights_TK) or (
        k == 1 and router.config.renormalise
    )


def test_the_cosine_does_not_fold_and_says_why():
    with pytest.raises(
        NotImplementedError,
        match=r"normalizes each token.*--router\.no-normalize-input",
    ):
        make().fold()


@pytest.mark.parametrize("form", FORMS)
def test_permuted_experts_change_the_order_alone(form):
    router, other = make(**FORMS[form]), make(**FORMS[form])
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    with torch.no_grad():
        other.embedding_EP.copy_(router.embedding_EP[order])
    left, right = router(some()), other(some())
    assert torch.equal(order[right.experts_TK], left.experts_TK)
    torch.testing.assert_close(right.weights_TK, left.weights_TK)


@pytest.mark.parametrize(("renormalise", "learns"), [(False, True), (True, False)])
def test_k1_warns_exactly_where_the_weight_is_one(renormalise, learns):
    router = make(topk=1, renormalise=renormalise)
    assert bool(list(router.config.warnings(topk=1))) != learns
    router(some()).weights_TK.sum().backward()
    assert router.projection_PD.grad.any() == learns


def test_sizes_and_flags():
    assert make().embedding_EP.shape == (E, E // 2)
    assert build_router("xmoe", hidden_size=D, num_experts=1, topk=1).projection_PD.shape == (1, D)
    flags = (
        "--router.name xmoe --router.no-normalize-input --router.projection-size 8 "
        "--router.init-temperature 0.1"
    )
    options = parse(["--data-path", "corpus", *flags.split()], routers=ROUTERS).router.options
    assert options == XMoERouter.Config(normalize_input=False, projection_size=8, init_temperature=0.1)
