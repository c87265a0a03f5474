"""Prepares a run: compares the checkpoint with the settings, and loads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter import console
from megatron_hyperrouter.checkpoint.description import SETTINGS
from megatron_hyperrouter.checkpoint.folder import CheckpointFolders, verify
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.train.resuming.changes import changes_of_course, changes_of_function
from megatron_hyperrouter.train.resuming.run_meta import differences, run_meta
from megatron_hyperrouter.train.resuming.saved_settings import saved_settings

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.engines.base import Engine
    from megatron_hyperrouter.train.resuming.start import Start


def resume(
    engine: Engine,
    config: RunConfig,
    folders: CheckpointFolders,
    start: Start,
    tokenizer: Mapping[str, Any] | None = None,
) -> int:
    """Load what the run begins with into ``engine`` (collective); returns the number of completed steps.

    ``start``: what :func:`decide` said.  ``tokenizer``: the identity of the run's tokenizer.
    """
    if start.folder is not None:
        _refuse_misfit(start, config, engine, tokenizer or {})
        verify(start.folder, engine)
        engine.load(start.folder, weights_only=start.weights_only)
        if engine.place.is_main:
            _report(start, config, engine)
    if aside := folders.rewind(start.step):
        console.warn(
            f"{folders.root.parent} has checkpoints after step {start.step}; moved "
            f"them to {aside}, with a copy of the metrics"
        )
    return start.step


def _report(start: Start, config: RunConfig, engine: Engine) -> None:
    """Say where the run begins, and what has changed since the checkpoint."""
    if not start.step:
        console.note(f"starting from the weights of {start.folder}")
        return
    meta, ours = start.manifest["meta"], run_meta(config, engine)
    console.note(f"continuing after step {start.step} of {start.folder}")
    for line in differences("layout", meta, ours):
        console.note(f"{line}: the optimizer state is redistributed")
    for line in differences("order", meta, ours):
        if "data" in meta:
            console.note(f"{line}: the run continues with data that it has not read yet")
        else:
            console.warn(f"{line}: the samples differ from those of the earlier run")
    if changed := changes_of_course(_saved_settings(start), config, step=start.step):
        head = f"from step {start.step + 1} on, these settings change training:"
        console.note("\n  - ".join([head, *changed]))


def _refuse_misfit(start: Start, config: RunConfig, engine: Engine, tokenizer: Mapping[str, Any]) -> None:
    saved, ours = start.manifest["meta"], run_meta(config, engine)
    theirs = f"use the settings of the run that wrote the checkpoint, from {start.folder}/{SETTINGS}"
    if lines := list(differences("sizes", saved, ours)):
        raise CheckpointError(
            "\n  - ".join(
                [f"the model in {start.folder} has different sizes from the model of this run:", *lines]
            ),
            remedy=theirs,
        )
    if start.weights_only:
        return
    lines = changes_of_function(_saved_settings(start), config)
    lines += _other_tokenizer(saved.get("tokenizer", {}), tokenizer)
    if lines and not config.checkpoint.override:
        raise CheckpointError(
            "\n  - ".join(
                [
                    f"these settings change the model that the weights in {start.folder} were trained for:",
                    *lines,
                ]
            ),
            remedy=f"{theirs}; or accept the change with --override",
        )
    if lines and engine.place.is_main:
        console.warn("\n  - ".join(["--override accepted these changes to the model:", *lines]))
    _refuse_layout(start, saved, ours)
    _refuse_other_growth(start, saved, ours)


def _refuse_other_growth(start: Start, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """A growing batch size and its learning rate depend on all earlier steps."""
    lines = list(differences("order", saved, ours))
    growing = saved.get("order", {}).get("rampup_batch_size") or ours["order"]["rampup_batch_size"]
    if growing and (lines := [line for line in lines if "batch-size" in line]):
        raise CheckpointError(
            "\n  - ".join([f"{start.folder} was written with different batch sizes:", *lines]),
            remedy="use the batch sizes of that run, or start a new run from its weights with --finetune",
        )


def _refuse_layout(start: Start, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """A state of format 1 works on one layout only; later formats work on any."""
    if not any(name.startswith("state-") for name in start.manifest["files"]):
        return
    if lines := list(differences("layout", saved, ours)):
        head = f"the optimizer state in {start.folder} has format 1, which fits only one layout:"
        raise CheckpointError(
            "\n  - ".join([head, *lines]),
            remedy=(
                "resume on the layout of the run that wrote the checkpoint, or load only the weights "
                "with --finetune"
            ),
        )


def _other_tokenizer(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    before, now = saved.get("sha256"), ours.get("sha256")
    if before and now and before != now:
        yield f"the tokenizer file had SHA-256 {before[:16]}... and now has {now[:16]}..."


def _saved_settings(start: Start) -> str:
    assert start.folder is not None
    return saved_settings(start.folder, start.manifest["files"])
