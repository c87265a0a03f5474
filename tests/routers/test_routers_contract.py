"""The contract that every router keeps: one test each over the registry, so a new router is under test when
its file exists.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_hyperrouter import ROUTERS, build_router
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.ops.balance import switch_loss, z_loss
from megatron_hyperrouter.ops.schedule import topk_at
from megatron_hyperrouter.routers import Router, Routing
from megatron_hyperrouter.routers.base import StepCounts, Tokens

T, D, E = 12, 16, 8
NAMES = sorted(ROUTERS)


class LocalExperts:
    """A bank of E linear experts on this rank."""

    def __init__(self) -> None:
        self.experts_EDD = torch.randn(E, D, D, generator=torch.Generator().manual_seed(1)) / D**0.5

    def scores_TE(self, x_TD: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
        return score(torch.einsum("td,edf->tef", x_TD.float(), self.experts_EDD))


def small(name: str, **changes: Any) -> Router:
    return build_router(
        name, **{"hidden_size": D, "num_experts": E, "topk": 2, "layer_number": 3, "seed": 5, **changes}
    )


def tokens(**options: Any) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(2), **options)


def route(router: Callable[..., Routing], x_TD: Tensor, **arguments: Any) -> Routing:
    return router(x_TD, experts=LocalExperts(), **arguments)


def objective(routing: Routing) -> Tensor:
    """Something that reaches weights, logits and losses."""
    total = (
        routing.weights_TK * torch.arange(1.0, routing.weights_TK.size(1) + 1)
    ).sum() + routing.logits_TE.square().mean()
    return total + sum(routing.losses.values())


def gradients(router: Router, x_TD: Tensor, loss: Tensor) -> list[Tensor]:
    wanted = [x_TD, *(parameter for parameter in router.parameters() if parameter.requires_grad)]
    return [g for g in torch.autograd.grad(loss, wanted, allow_unused=True) if g is not None]


def same(a: Routing, b: Routing) -> bool:
    return all(torch.equal(left, right) for left, right in zip(a[:3], b[:3], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_routing_has_the_promised_shapes(name):
    routing = route(small(name), tokens())
    assert len(routing) == 4  # callers may take it apart
    assert routing.logits_TE.shape == (T, E)
    assert routing.weights_TK.shape == routing.experts_TK.shape == (T, 2)
    assert (routing.logits_TE.dtype, routing.weights_TK.dtype, routing.experts_TK.dtype) == (
        torch.float32,
        torch.float32,
        torch.int64,
    )
    assert all(len(set(row)) == 2 and min(row) >= 0 and max(row) < E for row in routing.experts_TK.tolist())
    assert all(loss.shape == () for loss in routing.losses.values())


@pytest.mark.parametrize("name", NAMES)
def test_k_follows_the_schedule_and_evaluation_overrides_it(name):
    router = small(name, topk=partial(topk_at, start=1, end=5, steps=4))
    assert [route(router, tokens(), step=step).experts_TK.size(1) for step in range(6)] == [1, 2, 3, 4, 5, 5]
    for k in (1, 7, E):
        routing = route(router, tokens(), step=2, topk=k)
        assert routing.weights_TK.shape == (T, k)
    for k in (0, E + 1):
        with pytest.raises(ValueError, match=f"topk = {k}: must be from 1 to num_experts = {E}"):
            route(router, tokens(), topk=k)


@pytest.mark.parametrize("name", NAMES)
def test_one_training_step_leaves_state_keys_alone(name):
    router = small(name)
    before = {key: tensor.clone() for key, tensor in router.state_dict().items()}
    x_TD = tokens(requires_grad=True)
    objective(route(router, x_TD)).backward()
    trained = {key for key, parameter in router.named_parameters() if parameter.grad is not None}
    if trained:
        torch.optim.AdamW(router.parameters(), lr=0.1).step()
    router.begin_step()
    route(router, x_TD)
    after = router.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items() if key not in trained)


@pytest.mark.parametrize("name", NAMES)
def test_strict_reload_gives_the_same_routing(name):
    trained, fresh = small(name), small(name)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    if list(trained.parameters()):
        assert not same(route(trained, tokens()), route(fresh, tokens()))
    fresh.load_state_dict(trained.state_dict(), strict=True)
    assert same(route(trained, tokens()), route(fresh, tokens()))


@pytest.mark.parametrize("name", NAMES)
def test_weights_depend_on_seed_and_layer_alone(name):
    torch.manual_seed(1)
    first = route(small(name), tokens())
    torch.manual_seed(2)
    assert same(first, route(small(name), tokens()))
    assert not same(first, route(small(name, seed=6), tokens()))
    assert not same(first, route(small(name, layer_number=4), tokens()))


@pytest.mark.parametrize("name", NAMES)
def test_reset_fills_every_parameter_from_the_draws(name):
    """An engine redraws by global name, whatever the constructor did and wherever the parameters are."""
    router, asked = small(name), []

    def draw(parameter: str, shape: tuple[int, ...]) -> Tensor:
        asked.append(parameter)
        return torch.full(shape, 2.0)

    with torch.no_grad():
        for parameter in router.parameters():
            parameter.fill_(torch.nan)
    router.reset_parameters(draw)
    assert all(torch.isfinite(parameter).all() for parameter in router.parameters())
    assert {name: list(router.get_parameter(name).shape) for name in asked}.keys() <= dict(
        router.named_parameters()
    ).keys()


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda router: pickle.loads(pickle.dumps(router))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_routes_alike_and_is_independent(name, copier):
    router = small(name)
    # a forward pass must not leave anything behind that cannot be copied
    route(router, tokens(requires_grad=True))
    before = route(router, tokens())
    twin = copier(router)
    assert same(before, route(twin, tokens()))
    assert list(twin.state_dict()) == list(router.state_dict())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert same(before, route(router, tokens()))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_routing_and_gradients(name):
    router, x_TD = small(name, aux_loss_coeff=0.1), tokens(requires_grad=True)
    plain = route(router, x_TD)
    torch._dynamo.reset()
    compiled = route(torch.compile(router, backend="aot_eager"), x_TD)
    for left, right in zip(plain[:3], compiled[:3], strict=True):
        torch.testing.assert_close(left, right)
    for left, right in zip(
        gradients(router, x_TD, objective(plain)), gradients(router, x_TD, objective(compiled)), strict=True
    ):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_gives_the_same_gradients(name, reentrant):
    router = small(name, aux_loss_coeff=0.1, z_loss_coeff=0.1)
    results = []
    for recompute in (False, True):
        router.zero_grad()
        x_TD = tokens(requires_grad=True)
        total = (
            checkpoint(lambda x: objective(route(router, x)), x_TD, use_reentrant=reentrant)
            if recompute
            else objective(route(router, x_TD))
        )
        total.backward()
        results.append([x_TD.grad, *(parameter.grad for parameter in router.parameters())])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True) if left is not None)
    assert all((left is None) == (right is None) for left, right in zip(*results, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_float32_maths_for_bfloat16_tokens_and_under_autocast(name):
    router, x_TD = small(name), tokens().bfloat16()
    expected = route(router, x_TD.float())
    assert same(expected, route(router, x_TD))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(expected, route(router, x_TD))


@pytest.mark.parametrize("name", NAMES)
def test_a_bfloat16_module_still_routes_in_float32(name):
    router = small(name).bfloat16()
    x_TD = tokens().bfloat16().requires_grad_()
    routing = route(router, x_TD)
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == torch.float32
    objective(routing).backward()
    assert all(p.grad is None or p.grad.dtype == torch.bfloat16 for p in router.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_in_inference_mode_before_training_changes_nothing(name):
    fresh, evaluated, x_TD = small(name), small(name), tokens(requires_grad=True)
    evaluated.hold()
    with torch.inference_mode():
        route(evaluated, tokens())
    for left, right in zip(
        *(gradients(router, x_TD, objective(route(router, x_TD))) for router in (fresh, evaluated)),
        strict=True,
    ):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_balance_losses_are_multiplied_and_only_there_when_switched_on(name):
    plain = route(small(name), tokens())
    both = route(small(name, aux_loss_coeff=0.25, z_loss_coeff=0.5), tokens())
    assert {"aux", "z"}.isdisjoint(plain.losses)
    expected = {
        "aux": 0.25 * switch_loss(both.logits_TE.softmax(-1), both.experts_TK),
        "z": 0.5 * z_loss(both.logits_TE),
    }
    for key, value in expected.items():
        torch.testing.assert_close(both.losses[key], value)


@pytest.mark.parametrize("name", NAMES)
def test_folding(name):
    router = small(name, aux_loss_coeff=0.1)
    if name in ("xmoe", "stablemoe"):  # cosines, and routes by token id
        for refused in (router.linear, router.fold):
            with pytest.raises(NotImplementedError, match=f"router {name} "):
                refused()
        return
    W_ED, b_E = router.linear()
    assert W_ED.shape == (E, D)
    plain = router.fold()
    assert plain.name == "topk" and plain.training
    assert not router.eval().fold().training  # where noise is off, it stays off
    routing = route(plain, tokens())
    assert same(route(router, tokens()), routing)
    torch.testing.assert_close(
        routing.logits_TE, torch.nn.functional.linear(tokens(), W_ED, b_E), rtol=0, atol=0
    )
    assert routing.losses.keys() == {"aux"}
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert not same(route(router, tokens()), route(plain, tokens()))  # its weights are its own


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shards", [1, 2])
def test_no_tokens_cost_nothing(name, shards):
    router = small(name, aux_loss_coeff=1.0, z_loss_coeff=1.0)
    if shards == 2:  # the other one has no tokens either
        router.over_shards = router.gather_shards = torch.Tensor.clone
    ids_T = torch.zeros(0, dtype=torch.int64)
    x_TD = torch.zeros(0, D, requires_grad=True)
    routing = route(router, x_TD, tokens=Tokens(ids_T, ids_T, 4))
    assert tuple(routing.weights_TK.shape) == (0, 2)
    assert {"aux", "z"} <= set(routing.losses)
    assert all(float(loss) == 0.0 for loss in routing.losses.values()), routing.losses
    for gradient in gradients(router, x_TD, routing.weights_TK.sum() + sum(routing.losses.values())):
        assert not gradient.any()


@pytest.mark.parametrize("name", NAMES)
def test_unknown_options_and_sizes_are_reported_together(name):
    with pytest.raises(ConfigError) as caught:
        small(name, topk=E + 1, num_experts=E, hidden_size=0, no_such_option=3)
    assert [problem.field for problem in caught.value.problems] == [
        "--hidden-size",
        "--moe-router-topk",
        "--router.no_such_option",
    ]
    assert caught.value.exit_status == 2


class Group:
    """Stands for a layer whose process group cannot be copied."""

    def __init__(self) -> None:
        self.group = threading.Lock()

    def over(self, values: Tensor) -> Tensor:
        return values.clone()


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_leaves_the_layer_and_its_ranks_behind(name):
    router, layer = small(name, aux_loss_coeff=0.1), Group()
    router.over_shards = router.gather_shards = layer.over
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert (twin.over_shards, twin.gather_shards) == (None, None)
        assert same(route(twin, tokens()), route(router, tokens()))
    assert router.over_shards is not None
    try:
        plain = router.fold()
    except NotImplementedError:
        return
    assert plain.over_shards is None


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    ("topk", {"expert_bias": True}),
    ("topk", {"expert_bias": True, "bias_update_rate": 0.0}),
    ("topk", {"aux_loss": "global_batch"}),
    ("topk", {"aux_loss": "sequence"}),
    ("topk", {"jitter_eps": 0.1}),
    ("simsmoe", {"similarity_coeff": 0.0}),
    ("competesmoe", {"warm_up": 0.0, "rate": 1.0}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_what_needs_tokens_or_counts_says_so(name, options):
    """Where nobody brings them, as in a layer that a caller built, the method would be another one in
    silence.
    """
    told = Tokens(torch.arange(T) % 5, 7 + torch.arange(T), T // 2)
    router = small(name, aux_loss_coeff=0.1, **options)
    with_them, without = route(router, tokens(), tokens=told), route(router, tokens())
    needs_tokens = not same(with_them, without) or with_them.losses != without.losses
    router.end_step(
        StepCounts(1, float(T), torch.arange(E).double(), torch.ones(router.num_extra_counts).double())
    )
    changed = small(name, **options).state_dict()
    needs_counts = any(not torch.equal(tensor, changed[key]) for key, tensor in router.state_dict().items())
    warned = " ".join(router.config.unserved())
    # Without a loss that they belong to, simsmoe's counts serve nothing.
    assert ("the expert loads of all ranks" in warned) == (
        needs_counts and options != {"similarity_coeff": 0.0}
    )
    assert ("its arrive() before" in warned) == needs_tokens


BUFFERS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    ("topk", {"expert_bias": True, "aux_loss": "global_batch"}),
    ("hyper", {"anchor": True, "bias": True}),
]


@pytest.mark.parametrize(("name", "options"), BUFFERS, ids=str)
def test_built_on_meta_and_reset_it_is_the_router_of_the_constructor(name, options):
    with torch.device("meta"):
        router = small(name, **options)
        assert route(router, torch.empty(T, D)).experts_TK.shape == (T, 2)
    router.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.fill_(77)
    router.reset()
    expected = small(name, **options).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in router.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("name", "options"), BUFFERS, ids=str)
def test_built_under_another_default_dtype_buffers_and_folded_weights_are_float32(name, options, dtype):
    """As libraries do that load a model in bfloat16: a count in bfloat16 would stop growing."""
    expected = {key: buffer.dtype for key, buffer in small(name, **options).named_buffers()}
    torch.set_default_dtype(dtype)
    try:
        router = small(name, **options)
        folds = name not in ("xmoe", "stablemoe", "topk")  # topk is copied as it is
        plain = router.fold() if folds else router
    finally:
        torch.set_default_dtype(torch.float32)
    assert {key: buffer.dtype for key, buffer in router.named_buffers()} == expected
    assert same(route(router, tokens()), route(plain, tokens()))


@pytest.mark.parametrize("name", NAMES)
def test_vectors_of_another_shape_are_refused(name):
    for shape in ((2, T // 2, D), (D,), (T, D + 1)):
        with pytest.raises(ValueError, match=r"x_TD has the shape .*must be \[number of tokens, hidden_size"):
            route(small(name), torch.zeros(shape))
