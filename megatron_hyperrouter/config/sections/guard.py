"""Settings that protect a run from bad steps, hangs and damage; a section of the tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from megatron_hyperrouter.config.kinds import Count, Natural
from megatron_hyperrouter.config.roles import Metavar, Quiet, Role


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Bad steps, ranks that hang or whose weights differ, and alarms."""

    on_bad_step: Annotated[
        Literal["stop", "skip", "rollback"],
        Role.COURSE,
        "What to do at a bad step (loss or gradient norm not finite, or above the limit of "
        "--max-loss-sigma). stop: end the run; skip: do not update the weights; rollback: load "
        "the last checkpoint, and skip all steps up to the bad step",
    ] = "stop"
    max_loss_sigma: Annotated[
        float | None,
        Gt(0.0),
        Role.COURSE,
        "For --on-bad-step: a step is also bad if its loss or gradient norm is more than X "
        "standard deviations above the mean of the last --loss-window steps; default: no limit",
    ] = None
    loss_window: Annotated[
        int,
        Ge(2),
        Role.COURSE,
        "With --max-loss-sigma: number of previous good steps from which to take the mean and "
        "the standard deviation",
    ] = 128
    skip_steps: Annotated[
        tuple[str, ...],
        Role.COURSE,
        Metavar("STEPS"),
        "Steps or ranges of steps to skip, such as 105-107 300; the run reads their data, but "
        "does not train on them",
    ] = ()
    check_replicas_interval: Annotated[
        Count | None,
        Role.UPKEEP,
        "Every N steps and before each save, check that all copies of each weight are "
        "identical; if a copy differs, report its rank and stop; default: never",
    ] = None
    distributed_timeout_minutes: Annotated[
        float | None,
        Gt(0.0),
        Role.UPKEEP,
        "Stop if the run makes no progress for X minutes (at least 30 in the first step), and "
        "report which rank hangs; default: 10 with NCCL, else 30",
    ] = None
    expert_similarity_interval: Annotated[
        Natural,
        Role.UPKEEP,
        Quiet(0),
        "For the collapse alarm: every N steps, measure the similarity (CKA) of experts with "
        "consecutive numbers; 0: never",
    ] = 200
    alarm: Annotated[
        tuple[str, ...],
        Role.COURSE,
        Metavar("NAME=ACTION"),
        "What to do after an alarm. NAME: collapse, dead_experts, imbalance, entropy, "
        "loss_spike. ACTION: note (only report it), snapshot (save a checkpoint), raise-aux "
        "(raise the weight of the load-balancing loss for a while), stop (save a checkpoint, "
        "and end the run); default: note for every alarm",
    ] = ()
