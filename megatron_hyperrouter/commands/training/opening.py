"""The fields of an attempt's first event: the number of steps, the machines, and the software."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence

import torch

from megatron_hyperrouter import __version__
from megatron_hyperrouter.compat.versions import TESTED, installed
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.guard.events import Fact
from megatron_hyperrouter.processes import processor_name

# Who started the job, and how often it was started before.
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_NAME", "TORCHELASTIC_RUN_ID")
_RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


def opening_of(config: RunConfig, world_size: int, hosts: Sequence[str]) -> dict[str, Fact]:
    """Facts for ``start`` and ``resume``."""
    facts: dict[str, Fact] = {
        "total": config.train.train_iters,
        "engine": config.engine.engine,
        "world_size": world_size,
        "hosts": list(hosts),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name(),
        "versions": _versions(),
    }
    if job := _set_in(os.environ, _JOBS):
        facts["job"] = job
    if restarts := _set_in(os.environ, _RESTARTS):
        facts["launcher_restarts"] = restarts
    return facts


def _versions() -> dict[str, str]:
    found = {"megatron_hyperrouter": __version__, "python": platform.python_version()}
    return found | {library: installed(library) or "none" for library in TESTED}


def _set_in(environ: Mapping[str, str], names: Sequence[str]) -> str:
    """``NAME=value`` of those that are set, in one line."""
    return " ".join(f"{name}={environ[name]}" for name in names if environ.get(name))
