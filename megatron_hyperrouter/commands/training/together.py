"""All ranks of a run begin with the same settings, the same checkpoint and the same data, or none begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_hyperrouter.config.by_role import leaves_with
from megatron_hyperrouter.config.leaves import flag, router_leaves, value_of
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import ConfigError, DataError, Problem
from megatron_hyperrouter.guard.meeting import Meeting
from megatron_hyperrouter.train.resuming.found_data import with_found_data
from megatron_hyperrouter.train.resuming.kept_tokenizer import with_kept_tokenizer
from megatron_hyperrouter.train.resuming.schedule import with_own_schedule
from megatron_hyperrouter.train.resuming.start import Start, decide, is_restarted
from megatron_hyperrouter.train.resuming.together import follow_rank_0

_PATIENCE = 60.0  # seconds until a file of one machine must be visible on all machines
_REMEDY = "start all ranks with the same command and the same files"


def agree_on_settings(config: RunConfig, meeting: Meeting) -> None:
    """ConfigError if a rank was given other settings; paths may differ between machines."""
    here = ("run_dir", "load")
    facts = {
        leaf.flag: value_of(config, leaf.name)
        for leaf in leaves_with(*Role)
        if leaf.role is not Role.DISPLAY and (not leaf.is_path or leaf.name in here)
    }
    facts["--router.name"] = config.router.name
    if config.router.options is not None:
        options: type = type(config.router.options)
        facts |= {flag(name): value_of(config, name) for name in router_leaves(options)}
    if difference := meeting.difference("settings", facts):
        raise ConfigError([Problem("settings", "", f"differ between ranks: {difference}", _REMEDY)])


def decide_together(config: RunConfig, meeting: Meeting) -> Start:
    """Rank 0 decides what is loaded; CheckpointError if another rank does not see that checkpoint."""
    # Each node counts only the restarts after a failure of its own ranks, so that of rank 0 may know of none.
    restarted = is_restarted(config.logging.run_dir)
    restarted |= bool(meeting.difference("restarts", {"restarted": restarted}))
    return follow_rank_0(lambda: decide(config, restarted=restarted), meeting)


def with_checkpoints_settings(config: RunConfig, start: Start) -> RunConfig:
    """The settings, with the schedule, the tokenizer and the data of the checkpoint if they ask for them."""
    return with_found_data(with_kept_tokenizer(with_own_schedule(config, start), start), start)


def agree_on_data(meeting: Meeting, tokenizer: Mapping[str, Any], files: Mapping[str, object]) -> None:
    """DataError if a rank reads other data or has another tokenizer; their paths may differ."""
    facts: dict[str, object] = {"the tokenizer": dict(tokenizer)}
    facts |= {f"data file {number}": identity for number, identity in enumerate(files.values(), 1)}
    if difference := meeting.difference("data", facts):
        raise DataError(f"the data differ between ranks: {difference}", remedy=_REMEDY)
