"""``--use-checkpoint-opt-param-scheduler``: the schedule of the run that wrote the checkpoint."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter import console
from megatron_hyperrouter.checkpoint.description import SETTINGS
from megatron_hyperrouter.config.by_role import names_with
from megatron_hyperrouter.config.reading.yaml_text import parse_yaml
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.config.schedules.batch_sizes import BatchSizes
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.train.resuming.saved_settings import saved_settings

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.train.resuming.start import Start

# What megatron-core's scheduler has in its state in addition to the roles of a schedule
_MORE = ("lr", "min_lr", "weight_decay")


def with_own_schedule(config: RunConfig, start: Start) -> RunConfig:
    """The settings with the schedule of the checkpoint, where they ask for it; CheckpointError if the
    checkpoint does not say what it was.
    """
    if not config.checkpoint.use_checkpoint_opt_param_scheduler or not start.step or start.folder is None:
        return config
    path = start.folder / SETTINGS
    text = saved_settings(start.folder, start.manifest["files"])
    saved = parse_yaml(text)
    if not isinstance(saved, dict):
        rule = "has no settings" if text else "is missing"
        raise CheckpointError(
            f"{path} {rule}, so the checkpoint's learning-rate schedule is unknown",
            remedy=(
                "instead of --use-checkpoint-opt-param-scheduler, set the schedule with --lr, "
                "--min-lr, --lr-decay-style, --lr-decay-iters, --lr-warmup-iters and --weight-decay"
            ),
        )
    scheduled = {*names_with(Role.SCHEDULE), *_MORE} & {field.name for field in fields(config.optimizer)}
    taken: dict[str, Any] = {name: saved[name] for name in sorted(scheduled & saved.keys())}
    if taken.get("lr_decay_iters") is None:  # it led to the end of that run, not of this one
        sizes = BatchSizes(int(saved.get("global_batch_size") or 1), saved.get("rampup_batch_size"))
        taken["lr_decay_iters"] = math.ceil(sizes.progress(int(saved["train_iters"])))
    made = replace(config.optimizer, **taken)
    changed = [name for name in taken if getattr(made, name) != getattr(config.optimizer, name)]
    if changed and console.speaks():
        shown = ", ".join(f"{name.replace('_', '-')} {getattr(made, name)}" for name in changed)
        console.note(f"using the checkpoint's schedule: {shown}")
    return replace(config, optimizer=made)
