"""HyperRouter: what it generates, its scale, its gradient, its frozen part and its checkpoints."""

from __future__ import annotations

import copy
import gc
import math
import pickle

import pytest
import torch

from megatron_hyperrouter import build_router
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.ops import keyed
from megatron_hyperrouter.ops.balance import entropy
from megatron_hyperrouter.ops.hypernet import generate


def small(**changes):
    return build_router(
        "hyper",
        **{
            "hidden_size": 12,
            "num_experts": 6,
            "topk": 2,
            "layer_number": 3,
            "seed": 5,
            "hypernet_width": 20,
            **changes,
        },
    )


def frozen_digest(router):
    return keyed.digest(router.frozen.tensors)


def test_the_hypernetwork_is_made_of_named_streams():
    w1_HS, b1_H, w2_HP, b2_P = small(init="paper", bias=True, embedding_size=7).frozen.tensors
    assert torch.equal(w1_HS, keyed.normal((20, 7), seed=5, name="hypernet.layer3.w1") * 0.02)
    w2_HED = keyed.normal((20, 6, 12), seed=5, name="hypernet.layer3.w2") * 0.02
    assert torch.equal(w2_HP.view(20, 6, 13)[:, :, :12], w2_HED)
    assert torch.equal(
        w2_HP.view(20, 6, 13)[:, :, 12:],
        keyed.normal((20, 6, 1), seed=5, name="hypernet.layer3.w2_bias") * 0.02,
    )
    assert not b1_H.any()
    assert not b2_P.any()


@pytest.mark.parametrize("embedding_size", [None, 7])
def test_linear_is_generated_from_the_embedding(embedding_size):
    router = small(bias=True, embedding_size=embedding_size)
    w1_HS, b1_H, w2_HP, b2_P = router.frozen.tensors
    W_ED, b_E = generate(router.embedding_S, w1_HS, b1_H, w2_HP.t(), b2_P, 6)
    x_TD = torch.randn(4, 12)
    assert router.embedding_S.shape == (embedding_size or 12,)
    torch.testing.assert_close(router(x_TD).logits_TE, x_TD @ W_ED.t() + b_E)
    torch.testing.assert_close(router.linear()[1], b_E)


def test_the_bias_leaves_the_weights_alone():
    (with_W, with_b), (without_W, without_b) = (
        small(init="paper", bias=bias).linear() for bias in (True, False)
    )
    torch.testing.assert_close(with_W, without_W, rtol=1e-5, atol=1e-6)
    assert with_b.shape == (6,)
    assert without_b is None


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 64},
        {"hidden_size": 256},
        {"hidden_size": 1024},
        {"hidden_size": 64, "embedding_size": 48, "hypernet_width": 96, "num_experts": 5, "bias": True},
    ],
    ids=["64", "256", "1024", "other sizes, bias"],
)
def test_width_init_starts_logits_at_unit_standard_deviation(sizes):
    variances = []
    for layer in range(1, 17):
        sizes = {"hypernet_width": 256, "num_experts": 4, **sizes}
        router = build_router("hyper", topk=2, layer_number=layer, **sizes)
        x_TD = keyed.normal((256, sizes["hidden_size"]), seed=layer, name="x")
        variances.append(router(x_TD).logits_TE.detach().square().mean().item())
    # a layer's own scale varies by a tenth with its draw
    assert sum(variances) / 16 == pytest.approx(1.0, abs=0.15)
    assert min(variances) > 0.4
    assert max(variances) < 2.0


def test_paper_init_has_the_published_scale():
    """methods.md 3.4.5: generated weights of std 0.0725 and entropy 2.25 of at most 2.77 at D = H = 256, E =
    16.
    """
    stds, entropies = [], []
    for layer in range(1, 6):
        router = build_router(
            "hyper", hidden_size=256, num_experts=16, topk=2, layer_number=layer, init="paper", bias=True
        )
        W_ED, b_E = router.linear()
        stds.append(torch.cat((W_ED.flatten(), b_E)).detach().std().item())
        entropies.append(entropy(router(keyed.normal((500, 256), seed=layer, name="x")).logits_TE).item())
    assert sum(stds) / 5 == pytest.approx(0.0725, rel=0.04)
    assert sum(entropies) / 5 == pytest.approx(2.25, abs=0.08)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_embedding_gradient_is_the_formula_and_finite_differences(held, bias):
    """dL/de = W1^T (1[W1 e + b1 > 0] * (W2^T vec[dL/dW | dL/db])), methods.md 3.1."""
    router = small(bias=bias)
    router.hold(held)
    x_TD = torch.randn(9, 12)
    target_TK = torch.randn(9, 2)

    def loss(embedding_S):
        with torch.no_grad():
            router.embedding_S.copy_(embedding_S)
        router.begin_step()
        routing = router(x_TD)
        return (routing.weights_TK * target_TK).sum() + routing.logits_TE.square().mean()

    e = router.embedding_S.detach().clone()
    (ours,) = torch.autograd.grad(loss(e), router.embedding_S)

    W_ED, b_E = (None if t is None else t.detach().requires_grad_() for t in router.linear())
    logits_TE = torch.nn.functional.linear(x_TD, W_ED, b_E)
    kept = logits_TE.gather(1, router(x_TD).experts_TK).softmax(-1)
    by_weights = torch.autograd.grad(
        (kept * target_TK).sum() + logits_TE.square().mean(), [W_ED, *([b_E] if bias else [])]
    )
    grad_u = (
        torch.cat((by_weights[0], by_weights[1][:, None]), 1).flatten() if bias else by_weights[0].flatten()
    )
    w1_HS, b1_H, w2_HP, _ = router.frozen.tensors
    formula = w1_HS.t() @ ((w1_HS @ e + b1_H > 0) * (w2_HP @ grad_u))
    torch.testing.assert_close(ours, formula, rtol=1e-4, atol=1e-6)

    with torch.no_grad():
        steps = 1e-3 * torch.eye(12)
        differences = torch.stack([(loss(e + step) - loss(e - step)) / 2e-3 for step in steps])
    assert (ours - differences).norm() < 0.01 * ours.norm()


@pytest.mark.parametrize("held", [False, True])
def test_training_moves_the_embedding_and_no_byte_of_the_hypernetwork(held):
    router = small(bias=True)
    router.hold(held)
    before, embedding = frozen_digest(router), router.embedding_S.detach().clone()
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0.5)
    assert [name for name, _ in router.named_parameters()] == ["embedding_S"]
    for _ in range(5):
        optimizer.zero_grad()
        (router(torch.randn(8, 12)).weights_TK[:, 0] * torch.randn(8)).sum().backward()
        optimizer.step()
        router.begin_step()
    assert not torch.equal(router.embedding_S, embedding)
    assert frozen_digest(router) == before == router.frozen.digest
    assert all(not tensor.requires_grad and tensor.grad is None for tensor in router.frozen.tensors)


@pytest.mark.parametrize(
    "change",
    [
        torch.nn.Module.bfloat16,
        torch.nn.Module.half,
        torch.nn.Module.double,
        copy.deepcopy,
        lambda r: pickle.loads(pickle.dumps(r)),
    ],
    ids=["bfloat16", "half", "double", "deepcopy", "pickle"],
)
def test_no_cast_and_no_copy_changes_the_hypernetwork(change):
    router = small()
    before = frozen_digest(router)
    changed = change(router)
    assert frozen_digest(changed) == before
    assert all(tensor.dtype == torch.float32 for tensor in changed.frozen.tensors)
    assert changed(torch.randn(3, 12)).logits_TE.dtype == torch.float32


def test_a_pickle_holds_no_frozen_bytes_and_another_process_would_redraw_them():
    router = small(hypernet_width=2000)
    before, size = frozen_digest(router), sum(tensor.nbytes for tensor in router.frozen.tensors)
    data = pickle.dumps(router)
    assert len(data) < size / 50
    del router
    gc.collect()
    assert frozen_digest(pickle.loads(data)) == before


def test_a_large_hypernetwork_is_for_all_layers_unless_asked():
    """Experts x hidden size of 2^18 are the most that each layer has to itself."""
    for experts, shared, names in (
        (2**10, None, {"hypernet.layer1", "hypernet.layer2"}),
        (2**10 + 1, None, {"hypernet.model"}),
        (2**10 + 1, "layer", {"hypernet.layer1", "hypernet.layer2"}),
        (2**10, "model", {"hypernet.model"}),
    ):
        sizes = {"hidden_size": 2**8, "num_experts": experts, "hypernet_width": 1, "shared": shared}
        assert {small(layer_number=layer, **sizes).frozen.recipe.name for layer in (1, 2)} == names


def test_one_hypernetwork_for_all_layers():
    one, two = (small(layer_number=layer, shared="model") for layer in (1, 2))
    assert all(
        a.data_ptr() == b.data_ptr() for a, b in zip(one.frozen.tensors, two.frozen.tensors, strict=True)
    )
    assert torch.equal(
        one.frozen.tensors[0], keyed.normal((20, 12), seed=5, name="hypernet.model.w1") * 12**-0.5
    )
    assert not torch.equal(one.embedding_S, two.embedding_S)
    assert frozen_digest(small(layer_number=1)) != frozen_digest(small(layer_number=2))


def test_the_seed_option_is_that_of_the_hypernetwork_alone():
    own, run = (
        small(seed=5),
        build_router(
            "hyper", hidden_size=12, num_experts=6, topk=2, layer_number=3, seed=5, hypernet_width=20
        ),
    )
    assert frozen_digest(own) == frozen_digest(run)
    config = type(own.config)(hypernet_width=20, seed=77)
    other = type(own)(config, hidden_size=12, num_experts=6, topk=2, layer_number=3, seed=5)
    assert torch.equal(other.embedding_S, own.embedding_S)
    assert frozen_digest(other) == frozen_digest(small(seed=77))


def test_a_checkpoint_holds_seed_hash_and_embedding():
    state = small().state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == {
        "embedding_S": (12,),
        "frozen_seed": (1,),
        "frozen_hash": (32,),
    }
    assert int(state["frozen_seed"]) == 5
    assert bytes(state["frozen_hash"].tolist()).hex() == frozen_digest(small())


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"seed": 6}, "set --router.seed 5"),
        ({"init": "paper"}, "config.yaml"),
        ({"bias": True}, "config.yaml"),
        ({"layer_number": 4}, "config.yaml"),
        ({"shared": "model"}, "config.yaml"),
        ({"hypernet_width": 21}, "config.yaml"),
    ],
)
def test_a_checkpoint_of_another_hypernetwork_is_refused(change, remedy):
    router = torch.nn.Sequential(small(**change))
    embedding = router[0].embedding_S.detach().clone()
    with pytest.raises(
        CheckpointError, match=r"was trained with frozen router weights drawn from seed 5"
    ) as caught:
        router.load_state_dict(torch.nn.Sequential(small()).state_dict())
    assert remedy in caught.value.remedy
    assert caught.value.exit_status == 4
    assert torch.equal(router[0].embedding_S, embedding)


def test_a_checkpoint_without_a_hash_is_incomplete():
    with pytest.raises(RuntimeError, match="frozen_hash"):
        small().load_state_dict({"embedding_S": torch.zeros(12)})


def test_entropy_falls_as_the_embedding_grows():
    """The embedding's length is the temperature of the router: with zero biases W is homogeneous in it."""
    router, x_TD = small(), torch.randn(50, 12)
    before = router(x_TD).logits_TE.detach()
    with torch.no_grad():
        router.embedding_S.mul_(3)
    torch.testing.assert_close(router(x_TD).logits_TE, 3 * before)
    assert 0 < float(entropy(3 * before)) < float(entropy(before)) < math.log(6)
