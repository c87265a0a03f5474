"""What a run begins with: nothing, the weights of a checkpoint, or one of its own checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_hyperrouter import console
from megatron_hyperrouter.checkpoint.description import Description, describe
from megatron_hyperrouter.checkpoint.folder import check_language_model, find, read_manifest
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import CheckpointError, ConfigError, Problem
from megatron_hyperrouter.guard.events import FILE as EVENTS_FILE
from megatron_hyperrouter.guard.events import OPENING, read_events
from megatron_hyperrouter.guard.heartbeat import is_number
from megatron_hyperrouter.guard.launcher import start_of_torchrun

_CLOCKS = 5.0  # seconds by which the clocks of two machines may differ


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    ``folder``: the checkpoint, if there is one; ``weights_only``: a new run from its weights.
    ``finetuned_from``: the ``--load`` of a run that began with another one's weights, which each of its
    checkpoints knows.
    """

    folder: Path | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    weights_only: bool = False
    finetuned_from: str | None = None

    @property
    def step(self) -> int:
        """Completed steps."""
        return 0 if self.folder is None or self.weights_only else int(self.manifest["step"])

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """What the run has read of its data, see ``data.stream``; empty for a new run."""
        return list(self.manifest["meta"].get("data", [])) if self.step else []


def decide(config: RunConfig, *, restarted: bool = False) -> Start:
    """What ``--load`` and ``--finetune`` mean for the current state of the run folder.

    ``restarted``: see :func:`is_restarted`.  The run then continues, with or without ``--load``: nobody has
    asked for a new one.  CheckpointError if there is nothing to load.
    """
    load, own = config.checkpoint.load, _own_root(config)
    # --finetune with another run's --load continues its own run, too: see _begun
    elsewhere = load is None or (not config.checkpoint.finetune and not _is_own(load, own))
    if restarted and elsewhere and own.is_dir() and find(own) is not None:
        load = config.logging.run_dir
        console.note(f"this is a restart, so the run continues as with --load {load}")
    if load is None:
        return Start()
    if config.checkpoint.finetune and (begun := _begun(load, own)) is not None:
        return begun
    folder = find(Path(load))
    if folder is None:
        # The same command with --load must also continue a run that was killed before its first checkpoint.
        if not _is_own(load, own):
            raise CheckpointError(
                f"--load = {load}: the folder has no finished checkpoint",
                remedy="use a run folder, its checkpoints/ folder or one checkpoint folder, or leave "
                "out --load",
            )
        if config.checkpoint.finetune:
            raise CheckpointError(
                f"--load = {load}: the folder has no weights from which --finetune could start",
                remedy="give --load the run that has the weights",
            )
        console.note(f"{load} has no finished checkpoint yet: the run starts from scratch")
        return Start()
    manifest = read_manifest(folder)
    check_language_model(folder, manifest)
    if config.checkpoint.finetune:
        if folder.parent.resolve() == own.resolve():
            rule = f"contains the weights from which --finetune would start a new run ({folder})"
            remedy = "choose another --run-dir"
            raise ConfigError([Problem("--run-dir", config.logging.run_dir, rule, remedy)])
        return Start(folder, manifest, weights_only=True, finetuned_from=load)
    return Start(folder, manifest, finetuned_from=manifest["meta"].get("finetuned_from"))


def begin(
    config: RunConfig, start: Start | None, description: Description | None
) -> tuple[Start, Description]:
    """What a run begins with and what its checkpoints say; decided here if it was not decided before."""
    if start is None:
        start = decide(config, restarted=is_restarted(config.logging.run_dir))
    return start, description or describe(settings_again(config, start))


def settings_again(config: RunConfig, start: Start) -> RunConfig:
    """The settings that start the same run again: without ``--load`` of its own checkpoints, and with the
    weights that it began with.
    """
    checkpoint = replace(config.checkpoint, override=False)
    if start.finetuned_from is not None:
        checkpoint = replace(checkpoint, load=start.finetuned_from, finetune=True)
    elif checkpoint.load is not None and _is_own(checkpoint.load, _own_root(config)):
        checkpoint = replace(
            checkpoint,
            load=None,
            finetune=False,
            no_load_optim=False,
            no_load_rng=False,
            use_checkpoint_opt_param_scheduler=False,
        )
    return replace(config, checkpoint=checkpoint)


def settings_for_state(config: RunConfig, start: Start) -> RunConfig:
    """The settings with which an engine can take the optimizer state that the run begins with: that of
    format 1 lists the experts one by one.
    """
    listed = any(name.startswith("state-") for name in start.manifest.get("files", ()))
    if not (start.step and listed and config.engine.moe_grouped_gemm):
        return config
    console.note(
        f"{start.folder} has format 1, which stores each expert separately, so this run also computes each "
        "expert separately; --moe-grouped-gemm takes effect once the run resumes from its own checkpoint"
    )
    return replace(config, engine=replace(config.engine, moe_grouped_gemm=False))


def _begun(load: str, own: Path) -> Start | None:
    """The newest checkpoint of a finetuning that began before with the weights of ``load``."""
    folder = find(own) if own.is_dir() else None
    if folder is None:
        return None
    manifest = read_manifest(folder)
    begun_from = manifest["meta"].get("finetuned_from")
    if begun_from is None:
        return None
    same = load == begun_from or Path(load).resolve() == Path(begun_from).resolve()
    return Start(folder, manifest, finetuned_from=begun_from) if same or _is_own(load, own) else None


def is_restarted(run_dir: str) -> bool:
    """Whether torchrun has started the ranks of this node again, after one of them had failed, or Slurm has
    started this job again, and the run in ``run_dir`` had begun by then.

    If no earlier attempt of this torchrun or job has begun, the folder contains nothing or an older run.
    """
    if not (_count("TORCHELASTIC_RESTART_COUNT") or _count("SLURM_RESTART_COUNT")):
        return False
    try:
        events = read_events(Path(run_dir) / EVENTS_FILE)
    except OSError:  # on this rank alone, perhaps: the others must not wait for it
        return False
    begun = [event for event in events if event.get("event") in OPENING]
    return bool(begun) and (_is_of_this_torchrun(begun[-1]) or _is_of_this_job(begun[-1]))


def _count(name: str) -> int:
    """How often a launcher or a scheduler has started this process again."""
    word = os.environ.get(name, "")
    return int(word) if word.isdecimal() else 0


def _is_of_this_torchrun(opening: Mapping[str, Any]) -> bool:
    begun = opening.get("time")
    if not _count("TORCHELASTIC_RESTART_COUNT") or not is_number(begun):
        return False
    return begun > start_of_torchrun() - _CLOCKS


def _is_of_this_job(opening: Mapping[str, Any]) -> bool:
    """Whether an earlier attempt of this job of Slurm has written it."""
    job = f"SLURM_JOB_ID={os.environ.get('SLURM_JOB_ID')}"
    count = _count("SLURM_RESTART_COUNT")
    seen = str(opening.get("launcher_restarts", "")).split()
    return (
        bool(count)
        and job in str(opening.get("job", "")).split()
        and (f"SLURM_RESTART_COUNT={count}" not in seen)
    )


def _own_root(config: RunConfig) -> Path:
    return Path(config.logging.run_dir) / "checkpoints"


def _is_own(load: str, own: Path) -> bool:
    """Whether ``load`` is the run folder, or the folder of its checkpoints."""
    return Path(load).resolve() in (own.resolve(), own.parent.resolve())
