"""Settings of what keeps a run from being lost; a section of the tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt

from megatron_hyperrouter.config.kinds import Count, Natural
from megatron_hyperrouter.config.roles import Quiet, Role


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Bad steps, ranks that hang or differ, and alarms."""

    on_bad_step: Annotated[
        Literal["stop", "skip", "rollback"],
        Role.COURSE,
        "What to do with a step whose loss or gradient norm is not finite or too large: stop; skip the step; "
        "or roll back to the last checkpoint and skip all steps since",
    ] = "stop"
    max_loss_sigma: Annotated[
        float | None,
        Gt(0.0),
        Role.COURSE,
        "Treat a step as bad if its loss or gradient norm is this many standard deviations above the mean "
        "of the last --loss-window steps; "
        "default: only what is not finite",
    ] = None
    loss_window: Annotated[
        Count, Role.COURSE, "Number of preceding steps that --max-loss-sigma compares against"
    ] = 128
    skip_steps: Annotated[
        tuple[str, ...], Role.COURSE, "Steps to leave out, such as 105-107 300: read, but not trained on"
    ] = ()
    check_replicas_interval: Annotated[
        Count | None,
        Role.UPKEEP,
        "Every N steps, and before each save, check that the ranks that hold the same weights hold the same "
        "bits; stop and name the rank that differs; default: never",
    ] = None
    distributed_timeout_minutes: Annotated[
        float | None,
        Gt(0.0),
        Role.UPKEEP,
        "Stop a run that makes no progress for this many minutes and name the rank that hangs; the first "
        "step may take 30 minutes; default: 10 with NCCL, else 30",
    ] = None
    expert_similarity_interval: Annotated[
        Natural,
        Role.UPKEEP,
        Quiet(0),
        "Every N steps, measure how alike neighbouring experts are (CKA); the alarm collapse watches it; "
        "0: never",
    ] = 200
    alarm: Annotated[
        tuple[str, ...],
        Role.COURSE,
        "What to do when routing or loss leaves its usual range: NAME=ACTION ...; NAME: collapse, "
        "dead_experts, imbalance, entropy or loss_spike; ACTION: note (default), snapshot, raise-aux, stop",
    ] = ()
