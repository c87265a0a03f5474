"""All ranks of a run begin with the same settings, the same checkpoint and the same data, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hyperrouter.checkpoint.folder import read_manifest
from megatron_hyperrouter.config.by_role import leaves_with
from megatron_hyperrouter.config.leaves import flag, router_leaves, value_of
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import CheckpointError, ConfigError, DataError, HyperRouterError, Problem
from megatron_hyperrouter.guard.meeting import Meeting
from megatron_hyperrouter.train.resuming.start import Start, decide

_PATIENCE = 60.0  # seconds until a file system has shown to all machines what one of them has written
_REMEDY = "start all ranks with the same command and the same files"


def agree_on_settings(config: RunConfig, meeting: Meeting) -> None:
    """ConfigError where a rank was given other settings; paths on a machine of its own may differ."""
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
    """Rank 0 decides what is loaded; CheckpointError where another rank does not see that checkpoint."""
    if meeting.rank:
        return _followed(json.loads(meeting.decided("start", "")), meeting)
    try:
        start = decide(config)
    except HyperRouterError as error:
        meeting.decided("start", json.dumps({"error": str(error)}))
        raise
    told = {
        "folder": None if start.folder is None else str(start.folder),
        "weights_only": start.weights_only,
        "finetuned_from": start.finetuned_from,
        "digest": _digest(start.manifest),
    }
    return _followed(json.loads(meeting.decided("start", json.dumps(told))), meeting, start)


def agree_on_data(meeting: Meeting, tokenizer: Mapping[str, Any], files: Mapping[str, object]) -> None:
    """DataError where a rank reads other data or has another tokenizer; their paths may differ."""
    facts: dict[str, object] = {"the tokenizer": dict(tokenizer)}
    facts |= {f"data file {number}": identity for number, identity in enumerate(files.values(), 1)}
    if difference := meeting.difference("data", facts):
        raise DataError(f"the data differ between ranks: {difference}", remedy=_REMEDY)


def _followed(told: Mapping[str, Any], meeting: Meeting, start: Start | None = None) -> Start:
    """What rank 0 has decided, with this rank's own view of the checkpoint."""
    if "error" in told:
        raise CheckpointError(f"rank 0 cannot begin: {told['error']}")
    if start is None:
        start = Start()
        if told["folder"] is not None:
            folder = Path(told["folder"])
            manifest = _seen(folder, told["digest"])
            start = Start(folder, manifest, told["weights_only"], told["finetuned_from"])
    if difference := meeting.difference("checkpoint", {"the checkpoint's digest": _digest(start.manifest)}):
        raise CheckpointError(
            f"the ranks do not see the same checkpoint {told['folder']}: {difference}",
            remedy="check that all machines mount the same file system",
        )
    return start


def _seen(folder: Path, digest: str) -> Mapping[str, Any]:
    """The manifest, once this machine sees what rank 0 has seen; else what it sees in the end."""
    end = time.monotonic() + _PATIENCE
    while True:
        manifest: Mapping[str, Any] = {}
        with contextlib.suppress(CheckpointError):
            manifest = read_manifest(folder)
        if _digest(manifest) == digest or time.monotonic() > end:
            return manifest
        time.sleep(1.0)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest() if manifest else "none"
