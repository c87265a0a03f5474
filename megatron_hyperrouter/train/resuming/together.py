"""All ranks begin with the checkpoint that rank 0 has found, or none does."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_hyperrouter.checkpoint.folder import read_manifest
from megatron_hyperrouter.errors import CheckpointError, ConfigError, HyperRouterError, Problem
from megatron_hyperrouter.guard.meeting import Meeting
from megatron_hyperrouter.train.resuming.start import Start

_PATIENCE = 60.0  # seconds until a file system has shown to all machines what one of them has written


def follow_rank_0(decide: Callable[[], Start], meeting: Meeting) -> Start:
    """What ``decide`` says on rank 0 (collective); CheckpointError if another rank does not see that
    checkpoint.
    """
    if meeting.rank:
        return _followed(json.loads(meeting.decided("start", "")), meeting)
    try:
        start = decide()
    except HyperRouterError as error:
        meeting.decided("start", json.dumps({"error": str(error), "status": error.exit_status}))
        raise
    told = {
        "folder": None if start.folder is None else str(start.folder),
        "weights_only": start.weights_only,
        "finetuned_from": start.finetuned_from,
        "digest": _digest(start.manifest),
    }
    return _followed(json.loads(meeting.decided("start", json.dumps(told))), meeting, start)


def _followed(told: Mapping[str, Any], meeting: Meeting, start: Start | None = None) -> Start:
    """The decision of rank 0, combined with what this rank itself sees."""
    if "error" in told:
        if told["status"] == ConfigError.exit_status:  # all ranks end with one status
            rule, remedy = f"cannot start: {told['error']}", "follow the remedy of rank 0"
            raise ConfigError([Problem("rank 0", "", rule, remedy)])
        raise CheckpointError(f"rank 0 cannot start: {told['error']}")
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
    """The manifest, once this machine sees what rank 0 sees; after a time limit, whatever it sees then."""
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
