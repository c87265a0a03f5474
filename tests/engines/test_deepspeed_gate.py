"""A bare DeepSpeed MoE layer with our gate, against plain loops over experts; the statistics against NumPy.

Legend: ``T`` tokens, ``D`` hidden size, ``E`` experts, ``K`` active experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_hyperrouter.compat.deepspeed import skip_shm_build
from megatron_hyperrouter.engines.clock import Clock
from megatron_hyperrouter.engines.deepspeed.mlp_slot.gate import RouterGate
from megatron_hyperrouter.engines.statistics import RouterStatistics
from megatron_hyperrouter.routers import build_router
from megatron_hyperrouter.routers.base import Router, Routing

T, D, E = 24, 8, 4


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A world of this process alone; DeepSpeed's groups are forgotten afterwards."""
    from deepspeed.utils import groups

    skip_shm_build()
    store = f"file://{tmp_path_factory.mktemp('world')}/store"
    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, verbose=False, init_method=store, rank=0, world_size=1
    )
    yield
    groups._release_process_group_references(None)
    torch.distributed.destroy_process_group()


def moe_with(router: Router, **options: Any) -> MoE:
    """DeepSpeed's own layer, as a caller builds it, with our gate in it."""
    moe = MoE(
        D,
        nn.Sequential(nn.Linear(D, 12), nn.GELU(), nn.Linear(12, D)),
        num_experts=E,
        ep_size=1,
        k=1,
        use_rts=False,
    )
    moe.set_deepspeed_parallelism()
    for expert in experts_of(moe):  # DeepSpeed's experts are copies of one another
        for parameter in expert.parameters():
            nn.init.normal_(parameter, std=0.3)
    moe.deepspeed_moe.gate = RouterGate(router, **options)
    return moe


def experts_of(moe: MoE) -> nn.ModuleList:
    found: nn.ModuleList = moe.deepspeed_moe.experts.deepspeed_experts
    return found


def router_of(name: str, k: int, **options: Any) -> Router:
    return build_router(
        name, hidden_size=D, num_experts=E, topk=k, aux_loss_coeff=0.1, z_loss_coeff=0.01, **options
    )


def by_loop(
    x_TD: Tensor, router: Router, experts: nn.ModuleList, k: int, capacity: int
) -> tuple[Tensor, list[list[int]]]:
    """Token by token, expert by expert; an expert keeps its heaviest routes, earlier tokens first among
    equals.

    Returns the output and the tokens that each expert was given.
    """
    W_ED, _ = router.linear()
    logits_TE = x_TD @ W_ED.t()
    chosen = [sorted(range(E), key=lambda e: (-row[e], e))[:k] for row in logits_TE.tolist()]
    weights: list[dict[int, Tensor]] = [
        dict(zip(ids, row[ids].softmax(0), strict=True)) for row, ids in zip(logits_TE, chosen, strict=True)
    ]
    out, kept = [torch.zeros(D) for _ in range(len(x_TD))], []
    for expert in range(E):
        routes = sorted(
            (t for t in range(len(x_TD)) if expert in weights[t]),
            key=lambda t: (-weights[t][expert].item(), t),
        )
        kept.append(sorted(routes[:capacity]))
        for t in routes[:capacity]:
            out[t] = out[t] + weights[t][expert] * experts[expert](x_TD[t])
    return torch.stack(out), kept


def gradients(loss: Tensor, x: Tensor, moe: MoE) -> dict[str, Tensor]:
    named = {"x": x, **dict(moe.named_parameters())}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros(()) if grad is None else grad for name, grad in zip(named, found, strict=True)}


@pytest.mark.parametrize("capacity_factor", [None, 1.0, 0.3, 9.0])
@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("name", ["topk", "hyper"])
def test_layer_is_a_loop_over_experts(name: str, k: int, capacity_factor: float | None) -> None:
    router = router_of(name, k)
    moe = moe_with(router, capacity_factor=capacity_factor)
    x = torch.randn(3, T // 3, D, requires_grad=True)
    probe = torch.randn(3, T // 3, D)
    output, loss, counts = moe(x)
    capacity = T if capacity_factor is None else math.ceil(T * k / E * capacity_factor)
    expected, kept = by_loop(x.flatten(0, 1), router, experts_of(moe), k, capacity)
    torch.testing.assert_close(output.flatten(0, 1), expected, rtol=1e-5, atol=1e-6)
    # The routes before dropping, as DeepSpeed tells its caller.
    W_ED, _ = router.linear()
    assert (
        counts.tolist()
        == torch.bincount((x.flatten(0, 1) @ W_ED.t()).topk(k).indices.flatten(), minlength=E).tolist()
    )
    if capacity_factor is not None and capacity_factor < 1:
        assert max(map(len, kept)) == capacity  # something was dropped
    own = torch.stack(list(router(x.flatten(0, 1)).losses.values())).sum()
    torch.testing.assert_close(loss, own, rtol=1e-6, atol=0)
    found = gradients((output * probe).sum() + loss, x, moe)
    wanted = gradients((expected.view_as(output) * probe).sum() + own, x, moe)
    for parameter, grad in wanted.items():
        torch.testing.assert_close(found[parameter], grad, rtol=1e-4, atol=1e-6, msg=parameter)


def test_equal_weights_go_to_the_earlier_tokens() -> None:
    """At k = 1 every weight is 1; who is dropped must not depend on how a device sorts."""
    router = router_of("topk", 1)
    with torch.no_grad():
        router.get_parameter("weight_ED").zero_()  # equal logits: expert 0 for all
    moe = moe_with(router, capacity_factor=1.0)
    x = torch.randn(1, 2000, D)
    output, _, _ = moe(x)
    kept = output[0].abs().sum(-1) > 0
    assert kept.tolist() == [True] * 500 + [False] * 1500


def test_clock_sets_the_step_and_overrides_k() -> None:
    clock = Clock()
    router = build_router("topk", hidden_size=D, num_experts=E, topk=lambda step: 1 + step)
    gate = RouterGate(router, clock=clock)
    x_TD = torch.randn(T, D)
    assert gate(x_TD).experts_KT.shape == (1, T)
    clock.step = 2
    assert gate(x_TD).experts_KT.shape == (3, T)
    clock.topk = 2
    assert gate(x_TD).experts_KT.shape == (2, T)


def test_slots_are_cut_evenly_over_tensor_parallel_ranks() -> None:
    gate = RouterGate(router_of("topk", 2), capacity_multiple=7)
    routes = gate(torch.randn(T, D))
    assert routes.capacity % 7 == 0 and routes.load_E.max() <= routes.capacity < routes.load_E.max() + 7


def test_padding_for_tensor_parallel_ranks_takes_no_more_routes() -> None:
    x_TD = torch.randn(T, D)
    whole, cut = (
        RouterGate(router_of("topk", 2), capacity_factor=0.5, capacity_multiple=ranks)(x_TD)
        for ranks in (1, 7)
    )
    assert cut.capacity % 7 == 0 and cut.capacity > whole.capacity
    assert torch.equal(cut.experts_KT, whole.experts_KT) and torch.equal(cut.slots_KT, whole.slots_KT)
    assert (whole.experts_KT < 0).any()


def test_what_deepspeed_may_not_ask_for() -> None:
    gate = RouterGate(router_of("topk", 2))
    with pytest.raises(NotImplementedError, match="sparse routes"):
        gate(torch.randn(T, D), torch.ones(T))


class TestStatistics:
    def test_are_those_of_numpy(self) -> None:
        """Two micro-batches of different sizes in layer 2, one in layer 1."""
        statistics = RouterStatistics(2, E)
        routed = {1: [routing(10, 1)], 2: [routing(6, 3), routing(14, 2)]}
        for layer, routings in routed.items():
            for one in routings:
                statistics.record(router_of("topk", 1, layer_number=layer), one)
        found = statistics.summary(statistics.take())
        for layer, routings in routed.items():
            loads, entropies, aux, z, all_probs, variances = np.zeros(E), [], [], [], [], []
            for one in routings:
                logits = one.logits_TE.double().numpy()
                probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
                counts = np.bincount(one.experts_TK.numpy().ravel(), minlength=E)
                loads += counts
                entropies += (-(probs * np.log(probs)).sum(1)).tolist()
                all_probs += probs.tolist()
                variances += logits.var(1).tolist()
                aux.append(E * (counts / counts.sum() * probs.mean(0)).sum())
                z.append((np.log(np.exp(logits).sum(1)) ** 2).mean())
            row = layer - 1
            assert found["entropy"][row] == pytest.approx(np.mean(entropies), rel=1e-6)
            assert found["load_max_over_mean"][row] == pytest.approx(loads.max() / loads.mean(), rel=1e-9)
            assert found["aux"][row] == pytest.approx(np.mean(aux), rel=1e-6)
            assert found["z"][row] == pytest.approx(np.mean(z), rel=1e-6)
            assert found["dead_experts"][row] == sum(load < 0.05 * loads.mean() for load in loads)
            assert found["logit_std"][row] == pytest.approx(np.sqrt(np.mean(variances)), rel=1e-6)
            mean = np.mean(all_probs, axis=0)
            information = -(mean * np.log(mean)).sum() - np.mean(entropies)
            assert found["mutual_information"][row] == pytest.approx(information, rel=1e-5)
        assert not statistics.take().any()  # it began afresh

    def test_dead_experts_and_a_router_that_says_the_same_of_every_token(self) -> None:
        logits_TE = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(100, 4)
        experts_TK = torch.zeros(100, 1, dtype=torch.int64)
        experts_TK[:10] = 1
        experts_TK[10] = 2  # 1 of 100, less than 0.05 of the mean of 25
        statistics = RouterStatistics(1, 4)
        statistics.record(router_of("topk", 1), Routing(logits_TE, torch.ones(100, 1), experts_TK, {}))
        found = statistics.summary(statistics.take())
        assert found["dead_experts"] == [2.0]
        assert found["mutual_information"][0] == pytest.approx(0.0, abs=1e-6)

    def test_are_silent_while_evaluating(self) -> None:
        statistics = RouterStatistics(1, E)
        statistics.enabled = False
        statistics.record(router_of("topk", 2), routing(5, 2))
        assert not statistics.take().any()

    @pytest.mark.parametrize(
        "recompute",
        [
            lambda moe, x: checkpoint(lambda value: moe(value)[0], x, use_reentrant=False),
            lambda moe, x: checkpoint(lambda value: moe(value)[0], x, use_reentrant=True),
        ],
        ids=["saved tensors", "reentrant"],
    )
    def test_count_a_recomputed_layer_once(self, recompute: Callable[[MoE, Tensor], Tensor]) -> None:
        statistics, calls = RouterStatistics(1, E), []
        moe = moe_with(router_of("hyper", 2), statistics=statistics)
        moe.deepspeed_moe.gate.router.register_forward_hook(lambda *_: calls.append(1))
        x = torch.randn(1, T, D, requires_grad=True)
        moe(x)[0].sum().backward()
        once, plain_grad = statistics.take(), x.grad
        x.grad = None
        calls.clear()
        recompute(moe, x).sum().backward()
        assert len(calls) == 2  # it was computed again
        torch.testing.assert_close(statistics.take(), once, rtol=0, atol=0)
        torch.testing.assert_close(x.grad, plain_grad)


def routing(tokens: int, k: int) -> Routing:
    router = build_router("topk", hidden_size=D, num_experts=E, topk=k, init_std=1.0)
    with torch.no_grad():
        result: Routing = router(torch.randn(tokens, D))
    return result
