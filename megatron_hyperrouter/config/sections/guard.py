"""Settings that protect a run from bad steps, hangs and damage; a section of the tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt

from megatron_hyperrouter.config.kinds import Count, Natural
from megatron_hyperrouter.config.roles import Metavar, Quiet, Role


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Bad steps, ranks that hang or whose weights differ, and alarms."""

    on_bad_step: Annotated[
        Literal["stop", "skip", "rollback"],
        Role.COURSE,
        "What to do at a bad step. A step is bad if its loss or gradient norm is not finite, or "
        "exceeds the limit of --max-loss-sigma. stop: end the run; skip: do not update the weights; "
        "rollback: return to the last checkpoint, and skip the steps from there to the bad step",
    ] = "stop"
    max_loss_sigma: Annotated[
        float | None,
        Gt(0.0),
        Role.COURSE,
        "A step is also bad if its loss or gradient norm is this many standard deviations above the "
        "mean of the last --loss-window steps; default: no limit",
    ] = None
    loss_window: Annotated[
        Count, Role.COURSE, "Number of previous steps that --max-loss-sigma compares a step with"
    ] = 128
    skip_steps: Annotated[
        tuple[str, ...],
        Role.COURSE,
        Metavar("STEPS"),
        "Steps or ranges of steps to skip, such as 105-107 300: their data are read but not trained on",
    ] = ()
    check_replicas_interval: Annotated[
        Count | None,
        Role.UPKEEP,
        "Every N steps and before each save, check that all copies of a weight are identical; if "
        "one differs, report its rank and stop; default: never",
    ] = None
    distributed_timeout_minutes: Annotated[
        float | None,
        Gt(0.0),
        Role.UPKEEP,
        "Stop if the run makes no progress for this many minutes, and report which rank hangs; the "
        "first step may take 30 minutes; default: 10 with NCCL, else 30",
    ] = None
    expert_similarity_interval: Annotated[
        Natural,
        Role.UPKEEP,
        Quiet(0),
        "For the collapse alarm: measure the similarity (CKA) of neighboring experts every N steps; 0: never",
    ] = 200
    alarm: Annotated[
        tuple[str, ...],
        Role.COURSE,
        Metavar("NAME=ACTION"),
        "What to do after an alarm. Names: collapse, dead_experts, imbalance, entropy, loss_spike. "
        "Actions: note (report the alarm), snapshot (also save a checkpoint), raise-aux (also raise the "
        "weight of the load-balancing loss for a while), stop (also save a checkpoint and end the run); "
        "default: note for every alarm",
    ] = ()
