"""What a run does about bad steps, steps to skip, health alarms, and ranks whose weights differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter import console
from megatron_hyperrouter.errors import HyperRouterError
from megatron_hyperrouter.guard.bad_steps import BadSteps, attribution
from megatron_hyperrouter.guard.health.alarms import Alarms

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.engines.base import Deviation, Engine, StepResult


class RollBack(Exception):
    """The run has to return to its newest checkpoint."""


class GivenUp(Exception):
    """The run has to stop, and the current step does not count."""


class Recovery:
    """Follows ``--on-bad-step``; every rank makes the same decision, because it has the same numbers."""

    def __init__(self, engine: Engine, config: RunConfig, *, remedy: Callable[[int], str]) -> None:
        """``remedy``: what the user can do after that many steps (collective)."""
        self._engine, self._remedy = engine, remedy
        self._bad = BadSteps.of(config.guard, last=config.train.train_iters)
        self._alarms = Alarms(engine, config)
        self.asked = ""  # by an alarm of the last step: "snapshot" or "stop"
        self.good_until: int | None = None  # see Alarms

    def takes_part(self, step: int) -> bool:
        """Begin a step; False if its data are read but not trained on."""
        self.asked, self.good_until = "", None
        return self._bad.takes_part(step)

    def accept(self, result: StepResult) -> bool:
        """Whether the weights may follow this step."""
        return self._bad.accept(result)

    def after_good_step(
        self,
        step: int,
        result: StepResult,
        tell: Callable[..., None],
        similarity: Mapping[int, float] | None = None,
    ) -> None:
        """Watch the numbers of a step that has changed the weights; ``similarity``: see Alarms."""
        self.asked = self._alarms.after(step, result, tell, similarity)
        self.good_until = self._alarms.good_until

    def after_bad_step(
        self, step: int, result: StepResult, tell: Callable[..., None], checkpoint: int | None
    ) -> None:
        """Run the step again and report the result (collective); then follow the policy.

        ``tell``: calls the hooks; ``checkpoint``: step of the newest checkpoint.  Raises HyperRouterError
        if the run cannot continue, and RollBack.
        """
        reason, policy = self._bad.reason(result), self._bad.policy
        second, parts = self._engine.again()
        said = attribution(result, second, parts)
        tell("bad_step", step, reason=reason, attribution=said, action=policy)
        words = f"step {step}: {reason}; {said}"
        if policy == "stop" or (policy == "rollback" and not checkpoint):
            raise HyperRouterError(
                f"{words}; the run stops before this step changes the weights", remedy=self._remedy(step - 1)
            )
        first = step if policy == "skip" else (checkpoint or 0) + 1
        if not self._bad.leave_out(range(first, step + 1)):
            raise HyperRouterError(
                f"{words}; bad steps in a row: {self._bad.in_a_row}, so the run stops",
                remedy=self._remedy(step - 1),
            )
        if policy == "rollback":
            console.warn(f"{words}; returning to step {checkpoint} and skipping steps {first} to {step}")
            raise RollBack
        console.warn(f"{words}; the step is skipped")

    def meta(self) -> dict[str, Any]:
        """The state for the checkpoint."""
        return {"bad_steps": self._bad.state(), "alarms": self._alarms.state()}

    def restore(self, meta: dict[str, Any]) -> None:
        """Continue from a checkpoint's ``meta``."""
        if "bad_steps" in meta:
            self._bad.restore(meta["bad_steps"])
        self._alarms.restore(meta)


class ReplicaCheck:
    """Follows ``--check-replicas-interval``: ranks that have the same weights must have the same bits."""

    def __init__(self, engine: Engine, interval: int | None, *, step: int) -> None:
        """``step``: completed steps of the checkpoint that the run begins with."""
        self._engine, self._interval = engine, interval
        self._alike = step  # the step after which the replicas were last known to be equal

    def after(self, step: int, tell: Callable[..., None], *, saves: bool = False) -> None:
        """Compare at the interval and before each save (collective); HyperRouterError names the rank."""
        if self._interval is None or step == self._alike or not (saves or step % self._interval == 0):
            return
        if found := self._engine.deviations():
            facts = {"ranks": [rank for rank, _ in found[0].ranks], "tensor": found[0].name}
            facts["hosts"] = ", ".join(host for _, host in found[0].ranks)
            tell("alarm", step, alarm="replicas", tensors=len(found), action="stop", **facts)
            raise HyperRouterError(
                f"step {step}: {_deviation(found)}; up to step {self._alike}, all replicas agreed",
                remedy=(
                    "check these machines for memory errors, and continue without the faulty machine from a "
                    f"checkpoint of step {self._alike} or earlier"
                ),
            )
        self._alike = step

    def returned(self, step: int) -> None:
        """The run is back at a checkpoint of ``step``."""
        self._alike = step


def _deviation(found: list[Deviation]) -> str:
    first = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    said = f"{first.name}{more} on {_ranks(first.ranks)} differs from that on {_ranks(first.others)}"
    return said if first.sure else f"{said} (only two replicas: either may be wrong)"


def _ranks(places: tuple[tuple[int, str], ...]) -> str:
    shown = ", ".join(f"rank {rank} ({host})" for rank, host in places[:3])
    return shown if len(places) <= 3 else f"{shown} and {len(places) - 3} more ranks"
