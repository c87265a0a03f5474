"""Alarms: none without a cause, and one soon after each kind of failure of the routing."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.config.derived import ALARMS
from megatron_hyperrouter.engines.base import StepResult
from megatron_hyperrouter.guard.health.alarms import Alarms
from megatron_hyperrouter.guard.health.charts import (
    MEASURES,
    NAMES,
    Conditions,
    HealthCharts,
    Rise,
    Watch,
)
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.routers.base import RunFacts

BROKEN: dict[str, tuple[str, Callable[[StepResult], StepResult]]] = {
    # what happens to the numbers -> the alarm that tells it (values as measured in runs that were broken so)
    "an unbalancing loss": ("dead_experts", lambda r: layers(r, dead_share=0.3, load_max_over_mean=4.0)),
    "one popular expert": ("imbalance", lambda r: layers(r, load_max_over_mean=4.5)),
    "router weights x 10": ("entropy", lambda r: layers(r, entropy=0.01)),
    "few experts get all": ("collapse", lambda r: layers(r, effective_experts=0.3)),
    "learning rate x 30": ("loss_spike", lambda r: replace(r, lm_loss=r.lm_loss + 2.0)),
}


def layers(result: StepResult, **values: float) -> StepResult:
    """The second layer has these values."""
    return replace(
        result,
        layers={
            name: (own[0], values.get(name, own[1])) if name in values else own
            for name, own in result.layers.items()
        },
    )


def healthy(rng: random.Random, step: int) -> StepResult:
    around = {"dead_share": 0.0, "load_max_over_mean": 1.8, "entropy": 1.76, "effective_experts": 0.93}
    noise = {"dead_share": 0.0, "load_max_over_mean": 0.1, "entropy": 0.01, "effective_experts": 0.01}
    values = {
        name: tuple(level + noise[name] * rng.gauss(0, 1) for _ in range(2)) for name, level in around.items()
    }
    loss = 3.0 + 0.02 * rng.gauss(0, 1) - 0.0005 * step
    return StepResult(loss, 1.0, 0.0, 1.0, values, stop=False, peak_memory=0)


def health() -> HealthCharts:
    return HealthCharts(num_experts=16, first=10)


def run_of(steps: int, *, at: int = 10**9, broken: Callable[[StepResult], StepResult] | None = None) -> Any:
    rng, watch, found = random.Random(3), health(), []
    for step in range(1, steps + 1):
        result = healthy(rng, step)
        if broken is not None and step >= at:
            result = broken(result)
        found += [(step, each) for each in watch.see(step, result, topk=2, regime="k 2")]
    return found


def test_a_healthy_run_gives_no_alarm() -> None:
    assert run_of(2000) == []


@pytest.mark.parametrize("name", BROKEN)
def test_each_breakdown_is_told_within_20_steps(name: str) -> None:
    alarm, broken = BROKEN[name]
    step, finding = next(
        (step, each) for step, each in run_of(140, at=101, broken=broken) if each.measure == alarm
    )
    assert 101 <= step <= 121 and finding.since == 101
    assert finding.layer == (None if alarm == "loss_spike" else 2)
    assert f"{alarm}" in str(finding) and "since step 101" in str(finding)


def test_an_alarm_is_given_once_until_all_is_quiet() -> None:
    alarm, broken = BROKEN["one popular expert"]
    assert [each.measure for _, each in run_of(160, at=101, broken=broken)].count(alarm) == 1


def test_normal_noise_gives_no_alarm_in_100000_steps() -> None:
    """6 deviations, three times in a row: more often than once would be a mistake."""
    rng = random.Random(7)
    measure = replace(MEASURES[1], limit=None, floor=0.0)
    watch, conditions = Watch(measure), Conditions(16, 2)
    assert sum(watch.see(rng.gauss(0, 1), conditions) is not None for _ in range(100_000)) <= 1


def test_the_level_starts_anew_where_k_changes() -> None:
    rng, watch, found = random.Random(3), health(), []
    for step in range(1, 200):
        k = 2 if step < 100 else 4
        result = healthy(rng, step)
        result = layers(result, entropy=1.76 if k == 2 else 1.2)
        found += watch.see(step, result, topk=k, regime=f"k {k}")
    assert found == []


def test_values_that_are_no_numbers_and_the_absolute_limit() -> None:
    watch = Watch(
        replace(MEASURES[0], limit=lambda run: 0.25, lasting=5),
    )
    conditions = Conditions(16, 2)
    assert [watch.see(0.3, conditions) is not None for _ in range(8)] == [*[False] * 4, True, *[False] * 3]
    chart = Watch(MEASURES[1])
    for _ in range(40):
        chart.see(1.5, conditions)
    assert [chart.see(float("nan"), conditions) is not None for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize("stop", [40, 100, 102, 104])
def test_a_resumed_run_finds_the_same(stop: int) -> None:
    """The state goes through JSON, as in a checkpoint."""
    _, broken = BROKEN["one popular expert"]
    expected = run_of(140, at=101, broken=broken)
    rng, watch, found = random.Random(3), health(), []
    for step in range(1, 141):
        if step == stop + 1:
            state = json.loads(json.dumps(watch.state()))
            watch = health()
            watch.restore(state)
        result = healthy(rng, step)
        result = broken(result) if step >= 101 else result
        found += [(step, each) for each in watch.see(step, result, topk=2, regime="k 2")]
    assert found == expected and found


@pytest.mark.parametrize("schedule", [True, False])
def test_a_new_mix_of_the_data_starts_the_levels_again(schedule: bool) -> None:
    """The loss of the mix from step 300 on is higher: by design with the schedule, a spike without."""
    config = parse(["--mock-data"], routers=ROUTERS, world_size=1)
    mixes = json.dumps([{"from_step": first, "data_path": ["a"]} for first in (0, 300)])
    config = replace(config, data=replace(config.data, data_schedule=mixes if schedule else None))
    engine: Any = SimpleNamespace(place=SimpleNamespace(is_main=False), topk_at=lambda step: 2)
    alarms, told, rng = Alarms(engine, config), list[tuple[int, str]](), random.Random(3)
    for step in range(1, 501):
        result = healthy(rng, step)
        result = replace(result, lm_loss=result.lm_loss + (1.0 if step > 300 else 0.0))
        alarms.after(step, result, lambda event, step, **facts: told.append((step, facts["alarm"])))
    assert told == ([] if schedule else [(303, "loss_spike")])


@pytest.mark.parametrize("stages", [True, False])
def test_the_second_stage_of_a_method_starts_the_levels_again(stages: bool) -> None:
    """StableMoE freezes its routes after 300 of 1,000 steps: their loads are others by design."""
    share = "0.3" if stages else "1.0"
    words = [
        "--mock-data",
        "--router.name",
        "stablemoe",
        "--router.stage1-share",
        share,
        "--train-iters",
        "1000",
    ]
    config = parse(words, routers=ROUTERS, world_size=1)
    engine: Any = SimpleNamespace(place=SimpleNamespace(is_main=False), topk_at=lambda step: 2)
    alarms, told, rng = Alarms(engine, config), list[tuple[int, str]](), random.Random(3)
    for step in range(1, 501):
        result = layers(healthy(rng, step), entropy=1.76 if step <= 300 else 1.2)
        alarms.after(step, result, lambda event, step, **facts: told.append((step, facts["alarm"])))
    assert told == ([] if stages else [(303, "entropy")])


@pytest.mark.parametrize("charted_apart", [True, False])
@pytest.mark.parametrize("more", ["--router.rate 0.3", "--router.schedule function --router.block-steps 40"])
def test_competing_steps_have_charts_of_their_own(
    charted_apart: bool, more: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loads and loss of CompeteSMoE's competing steps are other ones by design."""
    words = ["--mock-data", "--router.name", "competesmoe", *more.split(), "--num-layers", "2", "--seed", "3"]
    config = parse(
        [*words, "--router.warm-up", "0"] if "rate" in more else words, routers=ROUTERS, world_size=1
    )
    if not charted_apart:
        monkeypatch.setattr(type(config.router.options), "variant", lambda *args, **more: "")
    facts = RunFacts(num_layers=2, train_iters=config.train.train_iters)
    routers = [
        ROUTERS["competesmoe"](
            config.router.options,
            hidden_size=4,
            num_experts=8,
            topk=2,
            layer_number=layer,
            seed=3,
            facts=facts,
        )
        for layer in (1, 2)
    ]
    engine: Any = SimpleNamespace(place=SimpleNamespace(is_main=False), topk_at=lambda step: 2)
    alarms, told, rng, seen = Alarms(engine, config), list[str](), random.Random(3), list[bool]()
    for step in range(1, 601):
        seen.append(any(router.competes(step - 1) for router in routers))
        result = healthy(rng, step)
        if seen[-1]:
            result = replace(layers(result, entropy=1.2), lm_loss=result.lm_loss + 1.0)
        alarms.after(step, result, lambda event, step, **facts: told.append(facts["alarm"]))
    assert 100 < sum(seen) < 500
    assert (told == []) == charted_apart


def test_a_breakdown_in_competing_steps_is_dated_by_its_first_step() -> None:
    rng, watch, found = random.Random(3), health(), []
    for step in range(1, 301):
        result = healthy(rng, step)
        if step >= 201 and step % 2:
            result = layers(result, entropy=0.01)
        variant = "competing" if step % 2 else ""
        found += [(step, each) for each in watch.see(step, result, topk=2, regime="k 2", variant=variant)]
        watch = restored(watch)
    assert [(step, each.measure, each.since) for step, each in found] == [(205, "entropy", 201)]


def restored(charts: HealthCharts) -> HealthCharts:
    """The same after a stop: the state goes through JSON, as in a checkpoint."""
    other = health()
    other.restore(json.loads(json.dumps(charts.state())))
    return other


def test_one_more_dead_expert_is_no_alarm_and_two_are() -> None:
    for dead, expected in ((1, []), (2, [("dead_experts", 101)])):
        broken = run_of(160, at=101, broken=lambda r, dead=dead: layers(r, dead_share=dead / 16))
        assert [(each.measure, each.since) for _, each in broken] == expected


def test_every_alarm_has_a_measure() -> None:
    assert set(NAMES) == set(ALARMS)


def test_a_large_k_has_no_limit_that_a_healthy_run_reaches() -> None:
    watch, conditions = Watch(MEASURES[1]), Conditions(4, 2)  # load max/mean is at most 2
    assert all(watch.see(1.9, conditions) is None for _ in range(60))


@pytest.mark.parametrize(
    "values, found",
    [
        ([0.3, 0.31, 0.3, 0.32, 0.49, 0.3], {}),
        ([0.3, 0.31, 0.3, 0.52, 0.53, 0.3, 0.55], {3: 0.5, 6: 0.5}),  # again, once it was low
        ([0.3, 0.95, 0.96], {1: 0.9}),  # the limit needs no level
        ([0.8, 0.8, 0.8, 0.89, 0.91], {4: 0.9}),
        ([0.3] * 3 + [0.4] * 3 + [0.49] * 30, {}),  # the level is that of the first third
        ([0.3, 0.3, 0.3, float("nan")], {3: 0.5}),
    ],
)
def test_similarity_that_rises(values: list[float], found: dict[int, float]) -> None:
    chart = Rise()
    told = {at: level for at, value in enumerate(values) if (level := chart.see(value)) is not None}
    assert told == pytest.approx(found)
