"""What the statistics take over from a router's losses, and passes that need no losses.

Legend: ``T`` tokens, ``D`` hidden size, ``E`` experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_hyperrouter import ROUTERS, build_router
from megatron_hyperrouter.engines import statistics
from megatron_hyperrouter.engines.clock import Clock, RouterSite
from megatron_hyperrouter.engines.statistics import RouterStatistics
from megatron_hyperrouter.routers import Router

T, D, E = 20, 12, 6
PLAIN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("topk", {}),
    ("hyper", {}),
    ("smoe_dropout", {"init_std": 1.0}),
)
OTHERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("topk", {"aux_loss": "global_batch"}),
    ("topk", {"score_function": "sigmoid"}),
    ("topk", {"aux_loss": "off"}),
    ("xmoe", {}),
)


def router(name: str, **options: Any) -> Router:
    return build_router(
        name,
        hidden_size=D,
        num_experts=E,
        topk=2,
        seed=5,
        aux_loss_coeff=0.3,
        z_loss_coeff=0.07,
        **options,
    )


def tokens() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("name", "options"), [*PLAIN, *OTHERS])
def test_losses_are_those_of_the_logits_and_choices(name: str, options: dict[str, Any]) -> None:
    """Whatever the router trains with, the step reports Switch's loss and the z-loss of its micro-batch."""
    one, counted = router(name, **options), RouterStatistics(1, E)
    routing = one(tokens())
    counted.record(one, routing)
    summary = counted.summary(counted.take())
    logits_TE = routing.logits_TE.detach()
    probs_TE = logits_TE.softmax(-1)
    share_E = torch.bincount(routing.experts_TK.flatten(), minlength=E) / routing.experts_TK.numel()
    assert summary["aux"] == pytest.approx([float(E * (share_E * probs_TE.mean(0)).sum())], rel=1e-6)
    assert summary["z"] == pytest.approx([float(logits_TE.logsumexp(-1).square().mean())], rel=1e-6)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-3, 2.0), (40.0, -7.0), (0.0, 3.0)])
def test_spread_of_the_logits(scale: float, shift: float) -> None:
    """Also of large logits that are nearly equal, and of equal ones."""
    one, counted = router("topk"), RouterStatistics(1, E)
    routing = one(tokens())
    generator = torch.Generator().manual_seed(1)
    logits_TE = shift + scale * torch.randn(T, E, generator=generator)
    counted.record(one, routing._replace(logits_TE=logits_TE))
    expected = np.sqrt(np.var(logits_TE.double().numpy(), axis=1).mean())
    assert counted.summary(counted.take())["logit_std"] == pytest.approx([expected], rel=1e-4)


@pytest.mark.parametrize(("name", "options"), PLAIN)
def test_losses_of_the_router_are_not_computed_again(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*_: object, **__: object) -> Tensor:
        raise AssertionError("the router has computed it")

    one, counted = router(name, **options), RouterStatistics(1, E)
    monkeypatch.setattr(statistics, "switch_loss", again)
    monkeypatch.setattr(statistics, "z_loss", again)
    counted.record(one, one(tokens()))


def test_a_forced_choice_has_a_loss_of_its_own() -> None:
    """With --moe-router-force-load-balancing, experts are not those that the router's loss is about."""
    counted = RouterStatistics(1, E)
    RouterSite(router("topk"), clock=Clock(balanced=True), statistics=counted).route(tokens())
    summary = counted.summary(counted.take())
    assert summary["load_max_over_mean"] == pytest.approx([1.0], abs=0.2)
    assert summary["aux"] == pytest.approx([1.0], rel=1e-2)


@pytest.mark.parametrize(("name", "options"), [*PLAIN, ("simsmoe", {})])
def test_without_details_the_others_stay(name: str, options: dict[str, Any]) -> None:
    """Of a step with several micro-batches, and with what the router itself counts."""
    rows, summaries = [], []
    for detailed in (True, False):
        one, counted = router(name, **options), RouterStatistics(1, E)
        counted.make_room(one.num_extra_counts)
        counted.detailed = detailed
        for count in (T, 7):
            counted.record(one, one(tokens()[:count]))
        rows.append(counted.take())
        summaries.append(counted.summary(rows[-1]))
    whole, brief = summaries
    assert set(whole) - set(brief) == {"logit_std", "mutual_information"} == set(statistics.DETAILS)
    assert brief == {key: whole[key] for key in brief}
    first, second = (counted.counts(row, 1, step=1, tokens=T + 7, replicas=1) for row in rows)
    assert torch.equal(first.load_E, second.load_E) and torch.equal(first.extra, second.extra)


def test_numbers_of_tokens_add_up() -> None:
    counted, one = RouterStatistics(1, E), router("topk")
    for count in (T, 3, T, 7):
        counted.record(one, one(tokens()[:count]))
    assert counted.tokens_L(counted.take()).tolist() == [T + 3 + T + 7]


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_an_engine_evaluates_without_losses(name: str) -> None:
    one = router(name)
    one.eval()
    assert {"aux", "z"} & one(tokens()).losses.keys()
    one.hold()
    assert not one(tokens()).losses
    one.train()
    assert {"aux", "z"} & one(tokens()).losses.keys()
