"""HyperRouter inside an engine: generation once per step is the same training as generation in every
forward.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_hyperrouter import build_router
from megatron_hyperrouter.routers import hyper

D, E, STEPS, MICRO_BATCHES = 12, 6, 4, 3


def small(**changes):
    return build_router(
        "hyper",
        **{
            "hidden_size": D,
            "num_experts": E,
            "topk": 2,
            "seed": 5,
            "hypernet_width": 20,
            "bias": True,
            **changes,
        },
    )


class Layer(torch.nn.Module):
    """A linear layer, then a router with linear experts, so that tokens need gradients too."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(3)
        self.before_DD = torch.nn.Parameter(torch.randn(D, D, generator=random) / D**0.5)
        self.experts_EDD = torch.nn.Parameter(torch.randn(E, D, D, generator=random) / D**0.5)
        self.router = small(aux_loss_coeff=0.01)

    def moe(self, x_TD, topk=None):
        routing = self.router(x_TD, topk=topk)
        out_TED = torch.einsum("td,edf->tef", x_TD, self.experts_EDD)
        mix_TE = torch.zeros_like(routing.logits_TE).scatter(1, routing.experts_TK, routing.weights_TK)
        return torch.einsum("te,ted->td", mix_TE, out_TED), routing.losses["aux"]

    def forward(self, x_TD, recompute=None, topk=None):
        x_TD = x_TD @ self.before_DD
        out_TD, aux = (
            self.moe(x_TD, topk)
            if recompute is None
            else checkpoint(self.moe, x_TD, topk, use_reentrant=recompute == "reentrant")
        )
        return out_TD.square().mean() + aux


def train(*, held, recompute=None, evaluate=None, compiled=False):
    """Losses and the parameters after a few steps of a few micro-batches each."""
    layer = Layer()
    layer.router.hold(held)
    run = torch.compile(layer, backend="aot_eager") if compiled else layer
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.03)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro_batch in range(MICRO_BATCHES):
            x_TD = torch.randn(16, D, generator=torch.Generator().manual_seed(100 * step + micro_batch))
            loss = run(x_TD, recompute)
            (loss / MICRO_BATCHES).backward()
            losses.append(loss.detach())
        optimizer.step()
        layer.router.begin_step()
        if evaluate is not None:
            with evaluate():
                run(torch.randn(16, D, generator=torch.Generator().manual_seed(7)), topk=E)
    return torch.stack(losses), {
        name: parameter.detach().clone() for name, parameter in layer.named_parameters()
    }


@pytest.mark.parametrize(
    "evaluate",
    [None, torch.no_grad, torch.inference_mode],
    ids=["no evaluation", "no_grad", "inference_mode"],
)
@pytest.mark.parametrize("recompute", [None, "reentrant", "non-reentrant"])
def test_held_training_is_the_same_training(recompute, evaluate):
    expected_losses, expected = train(held=False)
    losses, parameters = train(held=True, recompute=recompute, evaluate=evaluate)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=1e-6)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-6, atol=1e-6)
    assert not torch.equal(expected["router.embedding_S"], small().embedding_S)


@pytest.mark.parametrize("held", [False, True])
def test_compiled_training_is_the_same_training(held):
    torch._dynamo.reset()
    expected_losses, expected = train(held=False)
    losses, parameters = train(held=held, compiled=True, evaluate=torch.no_grad)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        parameters["router.embedding_S"], expected["router.embedding_S"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("recompute", [None, "reentrant", "non-reentrant"])
def test_one_generation_a_step_and_one_transposed_pass_a_micro_batch(monkeypatch, recompute):
    calls = {"generate": 0, "transposed": 0}

    def counted(name):
        original = getattr(hyper, name)

        def call(*arguments, **keywords):
            calls[name] += 1
            return original(*arguments, **keywords)

        monkeypatch.setattr(hyper, name, call)

    counted("generate")
    counted("transposed")
    train(held=True, recompute=recompute, evaluate=torch.no_grad)
    # the last evaluation generates anew
    assert calls == {
        "generate": STEPS + 1,
        "transposed": STEPS * MICRO_BATCHES,
    }


def test_without_begin_step_the_old_router_is_kept():
    """The promise of hold() is needed: it is what saves the work."""
    router, x_TD = small(), torch.randn(5, D)
    router.hold()
    before = router(x_TD).logits_TE
    with torch.no_grad():
        router.embedding_S.mul_(2)
    assert torch.equal(router(x_TD).logits_TE, before)
    router.begin_step()
    torch.testing.assert_close(router(x_TD).logits_TE, 2 * before)
    with torch.no_grad():
        router.embedding_S.mul_(2)
    router.hold(False)
    torch.testing.assert_close(router(x_TD).logits_TE, 4 * before)


@pytest.mark.parametrize(
    "change",
    [
        lambda router: router.load_state_dict({**router.state_dict(), "embedding_S": torch.ones(D)}),
        lambda router: router.reset_parameters(lambda name, shape: torch.ones(shape)),
    ],
    ids=["load_state_dict", "reset_parameters"],
)
def test_loading_and_resetting_need_no_begin_step(change):
    router, expected, x_TD = small(), small(), torch.randn(5, D)
    with torch.no_grad():
        expected.embedding_S.fill_(1.0)
    router.hold()
    router(x_TD)
    change(router)
    torch.testing.assert_close(router(x_TD).logits_TE, expected(x_TD).logits_TE, rtol=0, atol=0)


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda router: pickle.loads(pickle.dumps(router))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_held_router_is_not_held(copier):
    """Nobody calls begin_step on it."""
    router, x_TD = small(), torch.randn(5, D, requires_grad=True)
    router.hold()
    before = router(x_TD).logits_TE
    twin = copier(router)
    assert torch.equal(twin(x_TD).logits_TE, before)
    with torch.no_grad():
        twin.embedding_S.mul_(2)
    torch.testing.assert_close(twin(x_TD).logits_TE, 2 * before)
    assert torch.equal(router(x_TD).logits_TE, before)


def test_a_backward_pass_that_waits_for_old_weights_raises():
    router, x_TD = small(), torch.randn(5, D, requires_grad=True)
    router.hold()
    late = router(x_TD).weights_TK[:, 0].sum()
    router.begin_step()
    router(x_TD)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_generated_weights_stay_at_one_address():
    """What a captured graph needs."""
    router = small()
    router.hold()
    with torch.no_grad():
        addresses = []
        for _ in range(3):
            addresses.append([tensor.data_ptr() for tensor in router.linear()])
            router.embedding_S.add_(1)
            router.begin_step()
    assert addresses[0] == addresses[1] == addresses[2]


def test_held_bfloat16_embedding_gets_a_bfloat16_gradient():
    router, plain, x_TD = small().bfloat16(), small().bfloat16(), torch.randn(5, D).bfloat16()
    router.hold()
    for one in (router, plain):
        one(x_TD).weights_TK[:, 0].sum().backward()
    assert router.embedding_S.grad.dtype == torch.bfloat16
    torch.testing.assert_close(router.embedding_S.grad, plain.embedding_S.grad)


def test_offloading_activations_leaves_the_hypernetwork_where_it_is():
    packed = []

    def pack(tensor):
        packed.append(tensor.numel())
        return tensor

    router, x_TD = small(hypernet_width=50), torch.randn(5, D, requires_grad=True)
    router.hold()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        router(x_TD)
    assert max(packed) < router.frozen.tensors[2].numel()
