"""``--alarm NAME=ACTION``: measures of a run's health, the control chart that detects when one of them
leaves its usual range, and the action that follows.

Everything is computed from numbers that are the same on every rank, so every rank decides the same, on
every layout.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median_low
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter import console
from megatron_hyperrouter.config.derived import alarm_actions, moe_layers
from megatron_hyperrouter.config.schedules.mixes import scheduled
from megatron_hyperrouter.engines.base import StepResult

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.engines.base import Engine

_WINDOW, _LAG, _LEAST = (
    60,
    5,
    30,
)  # steps that a level is made of; the newest that it leaves out; fewest of them
_QUIET = 50  # steps without alarm after which a measure may give one again
_RAISE, _MOST = 2.0, 10.0  # factors of the auxiliary loss's coefficient: of one alarm, and of all together
_SETTLE = 500  # quiet steps after which the coefficient is as set again
_RISE, _ALIKE, _FIRST_VALUES = 0.2, 0.9, 3  # of the similarity of experts; how many values make a level
_PAUSE = 500  # steps between two checkpoints that alarms ask for
_LATE_STEPS, _LATE_SHARE = 20, 0.1  # steps, and the share of their time that a rank may cost the others
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
    Measure("dead_experts", "dead_share", 1, 0.03, lambda run: 0.25, experts=1.5),
    Measure("imbalance", "load_max_over_mean", 1, 0.15, _half_of_the_worst, 20),
    Measure("entropy", "entropy", -1, 0.02, lambda run: 0.1 * math.log(run.num_experts) * (run.topk > 1)),
    Measure("collapse", "effective_experts", -1, 0.02, lambda run: 0.5 * run.topk / run.num_experts),
    Measure("loss_spike", None, 1, 0.05, sigma=10.0),
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

    def __str__(self) -> str:
        where = "" if self.layer is None else f" in layer {self.layer}"
        return (
            f"{self.measure}{where}: {self.value:.4g}, outside the limit "
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
                found.append(MeasureOutOfRange(name, layer, value, threshold, since))
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


@dataclass
class LateData:
    """Names the rank whose data are so late that all ranks wait for it in every step."""

    clock: Callable[[], float] = time.monotonic
    _waits: deque[tuple[float, ...]] = field(default_factory=lambda: deque(maxlen=_LATE_STEPS))
    _times: deque[float] = field(default_factory=lambda: deque(maxlen=_LATE_STEPS + 1))
    _quiet_until: int = 0

    def see(self, step: int, waits: tuple[float, ...]) -> tuple[int, float] | None:
        """The rank, and the share of the last steps that it costs; None if none costs much."""
        self._times.append(self.clock())
        if len(waits) < 2 or (self._waits and len(self._waits[-1]) != len(waits)):
            return None
        self._waits.append(waits)
        if len(self._times) <= _LATE_STEPS or step < self._quiet_until:
            return None
        sums = [sum(each) for each in zip(*self._waits, strict=True)]
        rank = max(range(len(sums)), key=sums.__getitem__)
        share = (sums[rank] - median_low(sums)) / max(self._times[-1] - self._times[0], 1e-9)
        if share <= _LATE_SHARE:
            return None
        self._quiet_until = step + _PAUSE
        return rank, share


class Alarms:
    """Makes the same decisions on every rank, and changes nothing of a run without ``raise-aux`` and
    ``stop``.
    """

    def __init__(self, engine: Engine, config: RunConfig) -> None:
        self._engine, self._config = engine, config
        self._actions = alarm_actions(config.guard.alarm)
        self._health = HealthCharts(config.model.num_experts, 2 * config.optimizer.lr_warmup_iters)
        self._rise = Rise()
        self._factor, self._raised_at = 1.0, 0
        self._snapshot_at, self._kept_at = -_PAUSE, -_PAUSE
        self.good_until: int | None = (
            None  # steps before the first alarm of a while, where this step gave one
        )
        self._late = LateData()
        schedule = () if config.data.data_schedule is None else scheduled(config.data)
        routed = [number for number, each in enumerate(moe_layers(config), 1) if each]
        layers = config.model.num_layers
        self._layers = [*routed, *range(layers + 1, layers + 1 + (config.model.mtp_num_layers or 0))]
        self._mixes_from = [first for first, _ in schedule]  # steps, from 0

    def after(
        self,
        step: int,
        result: StepResult,
        tell: Callable[..., None],
        similarity: Mapping[int, float] | None = None,
    ) -> str:
        """Watch step ``step``, counted from 1; returns what the loop has to do: "", "snapshot" or "stop".

        ``similarity``: of the experts of each layer, in steps that measure it.
        """
        topk = self._engine.topk_at(step - 1)
        regime, variant = self._regime(step, topk), self._variant(step)
        found = self._health.see(step, result, topk=topk, regime=regime, variant=variant)
        # Step n shows the weights that step n - 1 left.
        good = [each.since - 2 for each in found]
        if similarity is not None and (alike := self._compare(step, similarity)) is not None:
            found.append(alike)
            good.append(step - self._config.guard.expert_similarity_interval)
        self.good_until = None
        if found and step - self._kept_at >= _PAUSE:
            self._kept_at, self.good_until = step, min(good)
        asked = {self._follow(step, each, tell) for each in found}
        if late := self._late.see(step, result.data_waits):
            self._tell_late(step, *late, tell)
        if self._factor > 1.0 and step - self._raised_at >= _SETTLE:
            self._set_factor(1.0, step)
        return "stop" if "stop" in asked else "snapshot" if "snapshot" in asked else ""

    def _regime(self, step: int, topk: int) -> str:
        """What changes the level of the measures by design, in step ``step``, counted from 1."""
        mix = bisect_right(self._mixes_from, step - 1)
        options = self._config.router.options  # None in settings that no parser has read
        stage = 1 if options is None else options.stage(step - 1, self._config.train.train_iters)
        counted = {"mix": mix, "stage": stage}
        return ", ".join([f"k {topk}", *(f"{name} {count}" for name, count in counted.items() if count > 1)])

    def _variant(self, step: int) -> str:
        """What makes step ``step``, counted from 1, unlike most others by design."""
        options, train = self._config.router.options, self._config.train
        if options is None:
            return ""
        num_layers = self._config.model.num_layers
        name: str = options.variant(
            step - 1, self._layers, seed=train.seed, num_layers=num_layers, train_iters=train.train_iters
        )
        return name

    def _compare(self, step: int, similarity: Mapping[int, float]) -> MeasureOutOfRange | None:
        if not similarity or step <= self._health.first:
            return None
        layer = max(similarity, key=similarity.__getitem__)
        threshold = self._rise.see(similarity[layer])
        return (
            None
            if threshold is None
            else MeasureOutOfRange("collapse", layer, similarity[layer], threshold, step)
        )

    def _tell_late(self, step: int, rank: int, share: float, tell: Callable[..., None]) -> None:
        """Print a note, independently of --alarm, because the model itself is fine."""
        facts = {"alarm": "late_data", "layer": None, "value": share, "threshold": _LATE_SHARE}
        tell("alarm", step, **facts, since=step - _LATE_STEPS + 1, action="note", rank=rank)
        if self._engine.place.is_main:
            console.warn(
                f"step {step}: all ranks wait for the data of rank {rank}, for {share:.0%} of the last "
                f"{_LATE_STEPS} steps; use more --num-workers, or check the disk of its machine"
            )

    def _follow(self, step: int, finding: MeasureOutOfRange, tell: Callable[..., None]) -> str:
        action = self._actions[finding.measure]
        tell(
            "alarm",
            step,
            alarm=finding.measure,
            layer=finding.layer,
            value=finding.value,
            threshold=finding.threshold,
            since=finding.since,
            action=action,
        )
        if self._engine.place.is_main:
            console.warn(f"step {step}: alarm {finding}; action: {action}")
        if action == "raise-aux":
            self._set_factor(min(_RAISE * self._factor, _MOST), step)
        if action == "snapshot":
            if step - self._snapshot_at < _PAUSE:
                return ""
            self._snapshot_at = step
        return action

    def _set_factor(self, factor: float, step: int) -> None:
        self._factor, self._raised_at = factor, step
        self._engine.set_aux_loss_coeff(factor * self._config.model.moe_aux_loss_coeff)

    def state(self) -> dict[str, Any]:
        """For the checkpoint, as JSON."""
        return {
            "health": self._health.state(),
            "aux_factor": self._factor,
            "raised_at": self._raised_at,
            "snapshot_at": self._snapshot_at,
            "kept_at": self._kept_at,
            "similarity": {"values": self._rise.values, "high": self._rise.high},
        }

    def restore(self, meta: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's ``meta``."""
        state = meta.get("alarms")
        if state is None:
            return
        self._health.restore(state["health"])
        self._snapshot_at = int(state["snapshot_at"])
        self._kept_at = int(state.get("kept_at", -_PAUSE))
        alike = state.get("similarity", {"values": [], "high": False})
        self._rise = Rise([float(value) for value in alike["values"]], bool(alike["high"]))
        self._set_factor(float(state["aux_factor"]), int(state["raised_at"]))
