"""Settings of saving and resuming."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from megatron_hyperrouter.config.kinds import Count, Natural, NonNegative
from megatron_hyperrouter.config.roles import FOLDER, Quiet, Role


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    save_interval: Annotated[
        Natural,
        Role.UPKEEP,
        "Number of steps between checkpoints; 0: save only at the end and every --save-interval-minutes",
    ] = 0
    save_interval_minutes: Annotated[
        NonNegative | None,
        Role.UPKEEP,
        "Number of minutes between checkpoints; 0: off; default: 30 without --save-interval, else 0",
    ] = None
    async_save: Annotated[
        bool, Role.UPKEEP, "Write checkpoints in the background, from a copy in CPU memory"
    ] = True
    keep_checkpoints: Annotated[
        Natural, Role.UPKEEP, Quiet(1), "Number of newest checkpoints to keep; 0: keep all checkpoints"
    ] = 0
    keep_every: Annotated[
        Natural,
        Role.UPKEEP,
        Quiet(0),
        "With --keep-checkpoints: also keep the checkpoint of each step that is a multiple of N; 0: off",
    ] = 0
    exit_duration_in_mins: Annotated[
        float | None, Gt(0.0), Role.UPKEEP, "Save and stop when the program has run for X minutes"
    ] = None
    trust_checkpoint: Annotated[
        bool,
        Role.START,
        (
            "Load the optimizer state of a checkpoint in the old format 1, which has no checksums; use"
            " this flag only if you trust the files"
        ),
    ] = False
    no_save_optim: Annotated[
        bool,
        Role.UPKEEP,
        (
            "Save checkpoints without the optimizer state; you can use their weights, but a run "
            "cannot resume exactly from them"
        ),
    ] = False
    no_load_optim: Annotated[
        bool,
        Role.START,
        "Resume at the step of the checkpoint, with a new optimizer state and a new random state",
    ] = False
    no_load_rng: Annotated[
        bool, Role.START, "Resume with a new random state instead of the random state in the checkpoint"
    ] = False
    use_checkpoint_opt_param_scheduler: Annotated[
        bool,
        Role.START,
        "When resuming, take the learning-rate schedule and the weight decay from the "
        "checkpoint, not from the settings",
    ] = False
    exit_interval: Annotated[
        Count | None, Role.UPKEEP, "Save and stop after the next step whose number is a multiple of N"
    ] = None
    load: Annotated[str | None, Role.START, FOLDER, "Run folder or checkpoint folder to resume from"] = None
    elastic: Annotated[
        bool,
        Role.START,
        "When resuming on another number of ranks, adjust the data-parallel size and the "
        "micro-batch size; the global batch size and all other sizes stay the same",
    ] = False
    finetune: Annotated[
        bool,
        Role.START,
        "Load only the weights from --load; start at step 0, with a new optimizer state and a "
        "new random state",
    ] = False
    override: Annotated[
        bool,
        Role.START,
        "When resuming, accept changed settings even if they change what the weights compute",
    ] = False
