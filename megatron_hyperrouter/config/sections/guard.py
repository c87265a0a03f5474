"""Settings that protect a run from bad steps, hangs and damage; a section of the tree."""

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
        "What to do at a bad step, whose loss or gradient norm is not finite or exceeds "
        "--max-loss-sigma. stop: end the run; skip: make no update; rollback: return to the last "
        "checkpoint, and skip the steps after it",
    ] = "stop"
    max_loss_sigma: Annotated[
        float | None,
        Gt(0.0),
        Role.COURSE,
        "Also call a step bad if its loss or gradient norm is this many standard deviations above the"
        " mean of the last --loss-window steps; default: no limit",
    ] = None
    loss_window: Annotated[
        Count, Role.COURSE, "Number of preceding steps that --max-loss-sigma compares with"
    ] = 128
    skip_steps: Annotated[
        tuple[str, ...],
        Role.COURSE,
        "Steps to skip, such as 105-107 300: their data are read, but not trained on",
    ] = ()
    check_replicas_interval: Annotated[
        Count | None,
        Role.UPKEEP,
        "Every N steps and before each save, check that ranks with the same weights agree bit for "
        "bit; if one differs, name it and stop; default: never",
    ] = None
    distributed_timeout_minutes: Annotated[
        float | None,
        Gt(0.0),
        Role.UPKEEP,
        "Stop if the run makes no progress for this many minutes, and name the rank that hangs; the "
        "first step may take 30 minutes; default: 10 with NCCL, else 30",
    ] = None
    expert_similarity_interval: Annotated[
        Natural,
        Role.UPKEEP,
        Quiet(0),
        "Steps between measurements of the similarity of neighbouring experts (CKA) for the "
        "collapse alarm; 0: never",
    ] = 200
    alarm: Annotated[
        tuple[str, ...],
        Role.COURSE,
        "Action of each alarm, as NAME=ACTION. Names: collapse, dead_experts, imbalance, entropy, "
        "loss_spike. Actions: note (default), snapshot, raise-aux, stop",
    ] = ()
