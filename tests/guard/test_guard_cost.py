"""What watching a run's health costs, beside a layer's experts: by hand, as it measures time."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from guard.test_guard_alarms import healthy

from megatron_hyperrouter import build_router
from megatron_hyperrouter.engines.statistics import RouterStatistics
from megatron_hyperrouter.guard.health.charts import HealthCharts
from megatron_hyperrouter.ops.grouped import collect, experts, sort_by_expert, spread

TOKENS, HIDDEN, EXPERTS, WIDTH, K = 4096, 256, 16, 512, 2


def seconds(work: Callable[[], object], *, times: int) -> float:
    """CPU time of one call, the least of five rounds."""
    rounds = []
    for _ in range(5):
        begin = time.process_time()
        for _ in range(times):
            work()
        rounds.append((time.process_time() - begin) / times)
    return min(rounds)


@pytest.mark.by_hand
def test_health_costs_less_than_half_a_percent_of_a_layer(capsys: pytest.CaptureFixture[str]) -> None:
    """The sums that alarms alone need, and the charts, against the experts' forward and backward passes."""
    router = build_router("topk", hidden_size=HIDDEN, num_experts=EXPERTS, topk=K)
    x_TD = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    w1 = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, requires_grad=True)
    w2 = torch.randn(EXPERTS, HIDDEN, WIDTH, requires_grad=True)
    routing = router(x_TD)
    probs_TE = routing.logits_TE.detach().softmax(-1)

    def layer() -> None:
        rows = sort_by_expert(routing.experts_TK.flatten(), EXPERTS)
        x_RD = spread(x_TD, rows.order_R, rows.row_R, K)
        y_RD = experts(x_RD, w1, w2, rows.ends_E, routing.weights_TK.detach().flatten()[rows.order_R])
        collect(y_RD, rows.order_R, rows.row_R, K).sum().backward()

    statistics, health = RouterStatistics(1, EXPERTS), HealthCharts(EXPERTS, first=0)
    import random

    rng, steps = random.Random(1), iter(range(1, 10**6))

    def watch() -> None:
        step = next(steps)
        health.see(step, healthy(rng, step), topk=K, regime="k 2")

    whole = seconds(layer, times=2)
    added = seconds(lambda: probs_TE.sum(0, dtype=torch.float64), times=50)
    everything = seconds(lambda: statistics.record(router, routing), times=20)
    charts = seconds(watch, times=100)
    with capsys.disabled():
        shares = {"sum of p": added, "all statistics": everything, "charts, once a step": charts}
        said = ", ".join(f"{name} {1e3 * each:.3f} ms ({each / whole:.2%})" for name, each in shares.items())
        print(f"\nexperts forward and backward {1e3 * whole:.1f} ms; {said}")
    assert everything + charts / 12 < 0.005 * whole  # a model of 12 layers has its charts once a step
