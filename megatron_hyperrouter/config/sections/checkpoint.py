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
        "Steps between checkpoints; 0: save only at the end and every --save-interval-minutes",
    ] = 0
    save_interval_minutes: Annotated[
        NonNegative | None,
        Role.UPKEEP,
        "Minutes between checkpoints; 0: off; default: 30 without --save-interval, else 0",
    ] = None
    async_save: Annotated[
        bool, Role.UPKEEP, "Write checkpoints in the background, from a copy in CPU memory"
    ] = True
    keep_checkpoints: Annotated[
        Natural, Role.UPKEEP, Quiet(1), "Keep this many of the newest checkpoints; 0: all"
    ] = 0
    keep_every: Annotated[
        Natural,
        Role.UPKEEP,
        Quiet(0),
        "Also keep the checkpoints of steps that are multiples of this; 0: off",
    ] = 0
    exit_duration_in_mins: Annotated[
        float | None, Gt(0.0), Role.UPKEEP, "Save and stop once the program has run for this many minutes"
    ] = None
    trust_checkpoint: Annotated[
        bool,
        Role.START,
        (
            "Trust the state-*.pt files of a checkpoint in the old format 1, which are pickles "
            "without checksums; a file with classes that an optimizer state does not need is still "
            "refused"
        ),
    ] = False
    no_save_optim: Annotated[
        bool,
        Role.UPKEEP,
        (
            "Save checkpoints without the optimizer state; the weights can be used, but a run cannot "
            "resume exactly"
        ),
    ] = False
    no_load_optim: Annotated[
        bool, Role.START, "Resume at the checkpoint's step, with a new optimizer state and random state"
    ] = False
    no_load_rng: Annotated[
        bool, Role.START, "Resume with the random state of a new run instead of the checkpoint's"
    ] = False
    use_checkpoint_opt_param_scheduler: Annotated[
        bool,
        Role.START,
        "Resume with the checkpoint's learning-rate schedule and weight decay instead of the given ones",
    ] = False
    exit_interval: Annotated[
        Count | None, Role.UPKEEP, "Save and stop after the next step that is a multiple of this"
    ] = None
    load: Annotated[str | None, Role.START, FOLDER, "Run folder or checkpoint folder to resume from"] = None
    elastic: Annotated[
        bool,
        Role.START,
        "When resuming on another number of ranks, adjust the data-parallel size and the "
        "micro-batch size automatically; the global batch size and all other parallel sizes stay "
        "the same",
    ] = False
    finetune: Annotated[
        bool,
        Role.START,
        "Load only the weights of --load; begin with a new optimizer state and random state, at step 0",
    ] = False
    override: Annotated[
        bool, Role.START, "When resuming, accept changed settings that alter what the weights compute"
    ] = False
