"""Which checkpoint of a run is the current one: the one that ``latest`` names, or without ``latest`` the
newest complete one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from megatron_hyperrouter import console, files
from megatron_hyperrouter.checkpoint.manifest import (
    MANIFEST,
    damage,
    folder_name,
    older,
    read_manifest,
    sealed_steps,
    step_of,
)
from megatron_hyperrouter.errors import CheckpointError, reason_of

LATEST = "latest"
PROVED = "proved"  # names the newest checkpoint that a healthy step has followed
KEPT = "kept"  # names checkpoints, one a line, that are never removed
NEW_LATEST = ".latest-"  # and a folder's name: the next ``latest``, written before that folder is in place
_LONGEST = 100  # bytes of a pointer
_CHECK = "check its permissions, and check the disk for errors"


class Pointer(NamedTuple):
    """What a file such as ``latest`` says: a step, or why it cannot be used."""

    step: int | None
    problem: str


def find(load: Path) -> Path | None:
    """The checkpoint that ``load`` means: the folder itself, or the current one in it or in its
    ``checkpoints/``.

    None if no checkpoint was ever finished.  If ``latest`` is missing or unusable, the newest checkpoint
    whose files are all intact, with a warning.  CheckpointError if there are checkpoints and none is
    usable.
    """
    try:
        if (load / MANIFEST).is_file():
            return load
        is_incomplete = step_of(load) is not None and load.is_dir()
    except OSError as error:
        raise CheckpointError(f"{load} cannot be read: {reason_of(error)}", remedy=_CHECK) from error
    if is_incomplete:
        message = f"{load / MANIFEST} is missing, so this checkpoint is incomplete"
        raise CheckpointError(message, remedy=older(load))
    for root in (load / "checkpoints", load):
        if (folder := _that_counts(root)) is not None:
            return folder
    return None


def latest_step(root: Path) -> int | None:
    """The step that ``latest`` names; None if it names none."""
    return _read(root / LATEST).step


def proved_step(root: Path) -> int | None:
    """The newest sealed checkpoint that is known to have been followed by a normal step."""
    step = _read(root / PROVED).step
    return step if step is not None and _is_sealed(root, step) else None


def publish(root: Path, step: int) -> None:
    """Make ``latest`` name a checkpoint, durably."""
    files.write_text(root / LATEST, folder_name(step) + "\n", durable=True)


def prove(root: Path, step: int) -> None:
    """Record that a healthy step has followed a checkpoint. A power failure may lose the record, which does
    no harm.
    """
    if _is_sealed(root, step):
        files.write_text(root / PROVED, folder_name(step) + "\n")


def keep(root: Path, step: int) -> None:
    """From now on, the checkpoint of this step is not removed by ``--keep-checkpoints``."""
    if _is_sealed(root, step) and step not in kept_steps(root):
        names = [folder_name(each) for each in sorted({*kept_steps(root), step})]
        files.write_text(root / KEPT, "".join(f"{name}\n" for name in names))


def kept_steps(root: Path) -> set[int]:
    """The steps that :func:`keep` has recorded."""
    try:
        names = (root / KEPT).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {step for name in names if (step := step_of(Path(name))) is not None}


def _that_counts(root: Path) -> Path | None:
    try:
        sealed = sealed_steps(root) if root.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"{root} cannot be read: {reason_of(error)}", remedy=_CHECK) from error
    step, problem = _read(root / LATEST)
    if step in sealed and step is not None:
        return root / folder_name(_finished(root, step, sealed))
    if step is not None:
        problem = f"names {folder_name(step)}, which is not a complete checkpoint"
    if sealed:
        return _newest_whole(root, sealed, problem or "is missing")
    if problem:
        raise CheckpointError(
            f"{root / LATEST} {problem}, and the folder has no complete checkpoint",
            remedy="restore the folder from a copy, or train again without --load",
        )
    return None


def _finished(root: Path, step: int, sealed: list[int]) -> int:
    """``step``, or a later step whose save was killed after its checkpoint was complete and before
    ``latest`` was replaced.
    """
    new = (other for other in sealed if (root / f"{NEW_LATEST}{folder_name(other)}").is_file())
    return max([step, *new])


def _newest_whole(root: Path, sealed: list[int], why: str) -> Path:
    """The newest checkpoint whose files are all intact."""
    damaged: list[str] = []
    for step in reversed(sealed):
        folder = root / folder_name(step)
        try:
            wrong = damage(folder, read_manifest(folder)["files"])
        except CheckpointError as error:
            wrong = error.message
        except OSError as error:
            wrong = f"{folder} cannot be read: {error}"
        if not wrong:
            passed_over = "".join(f"\n  skipped: {each}" for each in damaged)
            console.warn(
                f"{root / LATEST} {why}; using the newest complete checkpoint, {folder}{passed_over}"
            )
            return folder
        damaged.append(wrong)
    raise CheckpointError(
        "\n  - ".join([f"{root / LATEST} {why}, and no checkpoint in that folder is complete:", *damaged]),
        remedy="restore the folder from a copy, or train again without --load",
    )


def _is_sealed(root: Path, step: int) -> bool:
    return (root / folder_name(step) / MANIFEST).is_file()


def _without_waiting(path: str, flags: int) -> int:
    """Open the file without blocking, because a pipe with this name must not delay the start."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read(pointer: Path) -> Pointer:
    """If the file does not exist, there is neither a step nor a problem."""
    try:
        with open(pointer, "rb", opener=_without_waiting) as stream:
            content = stream.read(_LONGEST + 1)
    except (FileNotFoundError, NotADirectoryError):
        return Pointer(None, "")
    except OSError as error:
        return Pointer(None, f"cannot be read ({os.strerror(error.errno or 0)})")
    text = content.decode("utf-8-sig", errors="replace").strip("\0 \t\r\n")  # an editor may have written it
    if not text:
        return Pointer(None, "is empty")
    step = step_of(Path(text)) if text == Path(text).name else None
    return Pointer(
        step, "" if step is not None else (f"names {text[:60]!r}, which is not a checkpoint in this folder")
    )
