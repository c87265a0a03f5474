"""Measures of a run's health, and the control chart that detects when one of them leaves its usual range."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_hyperrouter.engines.base import StepResult

_WINDOW, _LAG, _LEAST = (
    60,
    5,
    30,
)  # steps that a level is made of; the newest that it leaves out; fewest of them
_QUIET = 50  # steps without alarm after which a measure may give one again
_RISE, _ALIKE, _FIRST_VALUES = 0.2, 0.9, 3  # of the similarity of experts; how many values make a level
_COUNTERS = ("above", "beyond", "above_since", "beyond_since", "quiet")  # of a chart
_MAD = 1.4826  # of a normal distribution: standard deviation / median absolute deviation


@dataclass(frozen=True)
class Conditions:
    """What the limits of some measures depend on."""

    num_experts: int
    topk: int


@dataclass(frozen=True)
class Measure:
    """A number of a step that is worse the larger it is (``sign`` 1) or the smaller (-1).

    Relative alarm: ``patience`` steps in a row beyond median + ``sigma`` x 1.48 MAD + floor.  The floor is
    ``floor``, or ``experts`` / E where this is more: a share of few experts moves in large steps.
    Absolute alarm: ``lasting`` steps in a row beyond ``limit``, where there is one.
    """

    alarm: str  # of --alarm
    number: str  # what is measured, in words
    layer_metric: str | None  # of engines.statistics.LAYER_METRICS: the worst layer counts; None: the loss
    sign: int
    floor: float
    limit: Callable[[Conditions], float] | None = None
    lasting: int = 50
    sigma: float = 6.0
    patience: int = 3
    experts: float = 0.0


def _half_of_the_worst(run: Conditions) -> float:
    """E / 2k of load max/mean; nothing if k is so large that a healthy run comes near it."""
    half = run.num_experts / (2 * run.topk)
    return half if half >= 2 else math.inf


MEASURES: tuple[Measure, ...] = (
    # One dead expert more than usual is no alarm: in healthy runs it comes and goes.
    Measure("dead_experts", "share of dead experts", "dead_share", 1, 0.03, lambda run: 0.25, experts=1.5),
    Measure("imbalance", "load max/mean", "load_max_over_mean", 1, 0.15, _half_of_the_worst, 20),
    Measure(
        "entropy",
        "router entropy in nats",
        "entropy",
        -1,
        0.02,
        lambda run: 0.1 * math.log(run.num_experts) * (run.topk > 1),
    ),
    Measure(
        "collapse",
        "effective number of experts / E",
        "effective_experts",
        -1,
        0.02,
        lambda run: 0.5 * run.topk / run.num_experts,
    ),
    Measure("loss_spike", "lm_loss", None, 1, 0.05, sigma=10.0),
)
NAMES = tuple(measure.alarm for measure in MEASURES)


@dataclass(frozen=True)
class MeasureOutOfRange:
    """A measure that has left its range."""

    measure: str
    layer: int | None  # in the model, from 1; None: of the whole run
    value: float
    threshold: float
    since: int  # the first step beyond the threshold
    number: str  # what the value is, in words

    def __str__(self) -> str:
        where = "" if self.layer is None else f" in layer {self.layer}"
        side = "below" if self.value < self.threshold else "above"
        if math.isnan(self.value):
            side = "outside"
        return (
            f"{self.measure}{where}: {self.number} = {self.value:.4g}, {side} the limit "
            f"{self.threshold:.4g} since step {self.since}"
        )


@dataclass
class Watch:
    """The chart of one measure.  It keeps plain numbers, so that it can go into a checkpoint."""

    measure: Measure
    values: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW + _LAG))
    above: int = 0  # steps in a row beyond the relative threshold
    beyond: int = 0  # ... and beyond the limit
    above_since: int = 0  # the first of them
    beyond_since: int = 0
    quiet: int = _QUIET

    def see(self, value: float, run: Conditions, *, step: int = 0) -> tuple[float, int] | None:
        """The threshold and the first step beyond it where this step gives an alarm; else None."""
        sign = self.measure.sign
        past = list(self.values)[:-_LAG]
        self.values.append(value)
        level = self._threshold(past, run)
        limit = None if self.measure.limit is None else self.measure.limit(run)
        # A value that is not a number is beyond everything.
        self.above = self.above + 1 if level is not None and not sign * value <= sign * level else 0
        self.beyond = self.beyond + 1 if limit is not None and not sign * value <= sign * limit else 0
        self.above_since = step if self.above == 1 else self.above_since
        self.beyond_since = step if self.beyond == 1 else self.beyond_since
        found = None
        if self.above >= self.measure.patience and level is not None:
            found = (level, self.above_since)
        elif self.beyond >= self.measure.lasting and limit is not None:
            found = (limit, self.beyond_since)
        fires = found is not None and self.quiet >= _QUIET
        self.quiet = 0 if found is not None else self.quiet + 1
        return found if fires else None

    def restart(self) -> None:
        """Forget the usual level."""
        self.values.clear()
        self.above = self.beyond = 0

    def _threshold(self, past: list[float], run: Conditions) -> float | None:
        if len(past) < _LEAST:
            return None
        measure, middle = self.measure, _median(past)
        spread = _MAD * _median([abs(each - middle) for each in past])
        floor = max(measure.floor, measure.experts / run.num_experts)
        return middle + measure.sign * (measure.sigma * spread + floor)

    def state(self) -> dict[str, Any]:
        """For the checkpoint, as JSON."""
        return {"values": list(self.values)} | {name: getattr(self, name) for name in _COUNTERS}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state` gave; an older checkpoint does not have every counter."""
        self.values.clear()
        self.values.extend(float(value) for value in state["values"])
        for name in _COUNTERS:
            setattr(self, name, int(state.get(name, 0)))


@dataclass
class Rise:
    """The chart of the similarity of experts, which is measured now and then: it gives an alarm where the
    value rises by ``_RISE`` over the median of the first third of all values, or above ``_ALIKE``.
    """

    values: list[float] = field(default_factory=list)
    high: bool = False

    def see(self, value: float) -> float | None:
        """The threshold, where this value is the first one in a row above it; else None."""
        early = self.values[: max(_FIRST_VALUES, len(self.values) // 3)]
        threshold = min(_ALIKE, _median(early) + _RISE) if len(early) >= _FIRST_VALUES else _ALIKE
        self.values.append(value)
        was_high, self.high = self.high, not value <= threshold
        return threshold if self.high and not was_high else None


def _new_watches() -> dict[str, Watch]:
    return {measure.alarm: Watch(measure) for measure in MEASURES}


@dataclass
class HealthCharts:
    """All charts of a run.  A chart starts again when its usual level changes by design: with k, the mix of
    the data, or the stage of a method.  Steps that are unlike most others by design have charts of their own.
    """

    num_experts: int
    first: int  # first steps, which are not watched
    watches: dict[str, Watch] = field(default_factory=_new_watches)
    variants: dict[str, dict[str, Watch]] = field(default_factory=dict)  # charts of other steps, by name
    regime: str = ""

    def see(
        self, step: int, result: StepResult, *, topk: int, regime: str, variant: str = ""
    ) -> list[MeasureOutOfRange]:
        """What this step, counted from 1, has shown."""
        if regime != self.regime:
            self.regime = regime
            for watch in self._all():
                watch.restart()
        if step <= self.first:
            return []
        run, found = Conditions(self.num_experts, topk), []
        watches = self.variants.setdefault(variant, _new_watches()) if variant else self.watches
        for name, watch in watches.items():
            value, layer = _worst(watch.measure, result)
            if value is None:
                continue
            if alarm := watch.see(value, run, step=step):
                threshold, since = alarm
                found.append(MeasureOutOfRange(name, layer, value, threshold, since, watch.measure.number))
        return found

    def _all(self) -> list[Watch]:
        return [watch for each in (self.watches, *self.variants.values()) for watch in each.values()]

    def state(self) -> dict[str, Any]:
        """For the checkpoint, as JSON."""
        return {
            "regime": self.regime,
            "watches": _states(self.watches),
            "variants": {name: _states(each) for name, each in self.variants.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state` gave; an older checkpoint has no variants."""
        self.regime = str(state["regime"])
        _restore(self.watches, state["watches"])
        for variant, kept in state.get("variants", {}).items():
            _restore(self.variants.setdefault(variant, _new_watches()), kept)


def _states(watches: Mapping[str, Watch]) -> dict[str, Any]:
    return {name: each.state() for name, each in watches.items()}


def _restore(watches: Mapping[str, Watch], states: Mapping[str, Any]) -> None:
    for name, kept in states.items():
        if name in watches:
            watches[name].restore(kept)


def _worst(measure: Measure, result: StepResult) -> tuple[float | None, int | None]:
    """The worst layer's value, and its number."""
    if measure.layer_metric is None:
        return result.lm_loss, None
    values_L = result.layers.get(measure.layer_metric)
    if not values_L:
        return None, None
    place = max(range(len(values_L)), key=lambda layer: measure.sign * values_L[layer])
    numbers = result.moe_layers or tuple(range(1, len(values_L) + 1))
    return values_L[place], numbers[place]


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
