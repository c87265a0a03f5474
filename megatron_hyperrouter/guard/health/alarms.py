"""``--alarm NAME=ACTION``: the action that follows when a measure of a run's health leaves its usual range.

Everything is computed from numbers that are the same on every rank, so every rank decides the same, on
every layout.
"""

from __future__ import annotations

import socket
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter import console
from megatron_hyperrouter.config.derived import alarm_actions, moe_layers
from megatron_hyperrouter.config.schedules.mixes import scheduled
from megatron_hyperrouter.engines.base import StepResult
from megatron_hyperrouter.guard.health.charts import HealthCharts, MeasureOutOfRange, Rise
from megatron_hyperrouter.guard.health.late_ranks import LateRank, LateRanks, sentence

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.engines.base import Engine

_RAISE, _MOST = 2.0, 10.0  # factors of the auxiliary loss's coefficient: of one alarm, and of all together
_SETTLE = 500  # quiet steps after which the coefficient is as set again
_PAUSE = 500  # steps between two checkpoints that alarms ask for


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
        self._late = LateRanks()
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
        for late in self._late.see(step, result):
            self._tell_late(step, late, tell)
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
            else MeasureOutOfRange(
                "collapse", layer, similarity[layer], threshold, step, "similarity of experts"
            )
        )

    def _tell_late(self, step: int, late: LateRank, tell: Callable[..., None]) -> None:
        """Report a late rank on the console and in events.jsonl.  Collective.  --alarm does not apply,
        because the model itself is fine.
        """
        own = self._engine.place.rank == late.rank
        host = self._engine.first_word(socket.gethostname() if own else "")
        rule = late.rule
        facts = {"value": late.value, "since": late.since, "rank": late.rank, "more": late.more}
        tell(
            "alarm",
            step,
            alarm=rule.alarm,
            layer=None,
            threshold=rule.threshold,
            action="note",
            host=host,
            **facts,
        )
        if self._engine.place.is_main:
            console.warn(f"step {step}: {sentence(rule, host, facts | {'step': step})}; {rule.remedy}")

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
