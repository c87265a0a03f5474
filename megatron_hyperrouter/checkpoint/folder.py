"""Checkpoint folders that are either complete or do not exist.

``root/step_0000100/`` contains one checkpoint, and ``root/latest`` the name of the newest one. A save
writes to a hidden folder, syncs every file to disk, seals the folder with ``manifest.json`` (sizes and
checksums), renames it, and only then replaces ``latest``. If the machine fails at any moment, ``latest``
names a complete checkpoint. Only ``keep`` deletes a sealed checkpoint: going back to an earlier step moves
later ones to a folder next to ``root``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_hyperrouter import files
from megatron_hyperrouter.checkpoint import pointers
from megatron_hyperrouter.checkpoint.manifest import (
    CLASSIFIER,
    FORMAT,
    MANIFEST,
    check_language_model,
    damage,
    files_of,
    fingerprint,
    folder_name,
    manifest_text,
    older,
    part_name,
    read_manifest,
    read_meta,
    refuse_unlisted,
    sealed_steps,
    step_of,
)
from megatron_hyperrouter.checkpoint.pointers import LATEST, NEW_LATEST, find
from megatron_hyperrouter.errors import CheckpointError, HyperRouterError

__all__ = [
    "CLASSIFIER",
    "FORMAT",
    "LATEST",
    "MANIFEST",
    "CheckpointFolders",
    "Ranks",
    "check_language_model",
    "find",
    "folder_name",
    "older",
    "read_manifest",
    "read_meta",
    "verify",
]

_WRITING, _REMOVING = ".writing-", ".removing-"  # what a killed run may leave behind


class _RankPlace(Protocol):
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...


class Ranks(Protocol):
    """The processes that save together; every engine is one."""

    @property
    def place(self) -> _RankPlace:
        """Which of the ranks this one is."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """True on all ranks when ``flag`` is true on one; waits for every rank."""
        ...

    def first_word(self, word: str) -> str:
        """On all ranks, the text of the first rank that has one; waits for every rank."""
        ...


class CheckpointFolders:
    """The checkpoints of one run, on a file system that every rank sees; methods marked collective need every
    rank.
    """

    def __init__(self, root: Path, ranks: Ranks, *, keep: int = 0, keep_every: int = 0) -> None:
        """``keep``: number of the newest checkpoints to keep (0: all); ``keep_every``: also keep those
        whose step is a multiple of this (0: none).
        """
        self.root, self.ranks, self.keep, self.keep_every = root, ranks, keep, keep_every
        self._is_main = ranks.place.rank == 0

    def save(
        self,
        step: int,
        write: Callable[[Path], object],
        meta: Mapping[str, Any],
        *,
        texts: Mapping[str, bytes] | None = None,
        join: Callable[[Path], None] | None = None,
    ) -> Path:
        """Save one checkpoint (collective): ``write`` is called with the folder for this rank's files, and
        then ``join`` on the main rank, for what needs the files of all.

        ``meta`` is any JSON mapping; ``read_meta`` gives it back. ``texts``: further files, by their path in
        the folder, which the main rank writes. When one rank fails, all raise CheckpointError, nothing of the
        new checkpoint stays, and the old ones and ``latest`` are as before. ``write`` must not leave the
        other ranks waiting in a collective when it raises.
        """
        writing = self.begin(step, texts)
        phases: tuple[Callable[[], object], ...] = (
            lambda: write(writing),
            lambda: join(writing) if join and self._is_main else None,
            lambda: self._seal_in_turn(writing),
            lambda: self.publish(step, meta) if self._is_main else None,
        )
        for phase in phases:
            self._together(step, phase)
        return self.root / folder_name(step)

    def begin(self, step: int, texts: Mapping[str, bytes] | None = None) -> Path:
        """The folder that a new checkpoint is written into (collective)."""
        writing, final = self._writing(step), self.root / folder_name(step)
        self._together(step, lambda: self._prepare(writing, final, texts or {}))
        return writing

    def _together(self, step: int, phase: Callable[[], object]) -> None:
        """One phase of a save, on all ranks (collective); if it fails on one rank, it fails on all."""
        error = _attempt(phase)
        if self.ranks.any_rank(error is not None):
            reason = reason_of(self.ranks, error)
            if self._is_main:
                self.discard(step)
            raise self._save_error(step, error, reason) from error

    def discard(self, step: int) -> None:
        """Remove the files of a failed save (main rank)."""
        shutil.rmtree(self._writing(step), ignore_errors=True)
        (self.root / f"{NEW_LATEST}{folder_name(step)}").unlink(missing_ok=True)

    def _writing(self, step: int) -> Path:
        return self.root / f"{_WRITING}{folder_name(step)}"

    def rewind(self, step: int) -> Path | None:
        """Make ``step`` the end of this run's history (collective); 0 for a new start.

        Unfinished folders of killed saves are removed.  Later checkpoints belong to another history of the
        run.  They are moved, with a copy of the metrics, to a folder next to ``root``; the main rank gets
        this folder, or None if there were none.
        """
        aside: list[Path] = []
        error = _attempt(lambda: aside.extend(self._rewind(step)))
        if self.ranks.any_rank(error is not None):
            reason = reason_of(self.ranks, error)
            if isinstance(error, HyperRouterError):
                raise error
            message = f"the checkpoint folder {self.root} cannot be prepared for this run: {reason}"
            raise CheckpointError(
                message, remedy="check its permissions, or choose another --run-dir"
            ) from error
        return aside[0] if aside else None

    def steps(self) -> list[int]:
        """Steps of the sealed checkpoints, oldest first."""
        return sealed_steps(self.root)

    def prove(self, step: int) -> None:
        """Record that a healthy step has followed the checkpoint of ``step``, if there is one, so its weights
        were good.
        """
        if self._is_main:
            with contextlib.suppress(OSError):  # without the note, one more checkpoint is kept
                pointers.prove(self.root, step)

    def keep_newest_until(self, step: int) -> None:
        """Keep the newest checkpoint of at most this step, with any ``keep`` (main rank)."""
        if self._is_main and (known := [each for each in self.steps() if each <= step]):
            pointers.keep(self.root, max(known))

    def back_to_proved(self) -> int | None:
        """Make ``latest`` name the newest proved checkpoint, if there is one; returns its step.

        For a run whose loss diverges right after a save, because that save may contain ruined weights.
        """
        step = pointers.proved_step(self.root)
        if step is not None and self._is_main:
            with contextlib.suppress(OSError):  # the remedy still names the checkpoint
                pointers.publish(self.root, step)
        return step

    def _prepare(self, writing: Path, final: Path, texts: Mapping[str, bytes]) -> None:
        if not self._is_main:
            return
        if not self.root.is_dir():
            self.root.mkdir(parents=True)
            files.sync(self.root.parent)
        self._sweep()
        if final.exists():
            raise CheckpointError(
                f"{final} already exists", remedy="choose another --run-dir, or move that folder away"
            )
        writing.mkdir()
        for name, content in texts.items():
            (writing / name).parent.mkdir(parents=True, exist_ok=True)
            with files.open_new(writing / name) as stream:
                stream.write(content)

    def _seal_in_turn(self, writing: Path) -> None:
        """Seal this rank's part of all files."""
        place = self.ranks.place
        self.seal(writing, files_of(writing)[place.rank :: place.world_size])

    def seal(self, writing: Path, own: Sequence[Path]) -> None:
        """Put these files on disk, readable to whom the umask allows, and note their checksums in this rank's
        part file.
        """
        part = writing / part_name(self.ranks.place.rank)
        unfinished = part.with_name(f"{part.name}.unfinished")
        unfinished.touch()
        mode = stat.S_IMODE(unfinished.stat().st_mode)
        found = {}
        for path in own:
            if (
                stat.S_IMODE(path.stat().st_mode) != mode
            ):  # safetensors creates files that other users cannot read
                path.chmod(mode)
            found[path.relative_to(writing).as_posix()] = fingerprint(path)
            files.sync(path)
        unfinished.write_text(json.dumps(found))
        files.sync(unfinished)
        os.replace(unfinished, part)  # a reader sees the complete file or none

    def seal_rest(self, writing: Path) -> None:
        """Seal all files that no other rank has sealed (main rank, after the others)."""
        sealed: set[str] = set()
        for rank in range(1, self.ranks.place.world_size):
            sealed |= json.loads((writing / part_name(rank)).read_text()).keys()
        rest = [path for path in files_of(writing) if path.relative_to(writing).as_posix() not in sealed]
        self.seal(writing, rest)

    def publish(self, step: int, meta: Mapping[str, Any]) -> Path:
        """Give the folder its name, and make it the latest one (main rank, once all ranks have sealed)."""
        writing, final = self._writing(step), self.root / folder_name(step)
        listed: dict[str, Any] = {}
        for rank in range(self.ranks.place.world_size):
            part = writing / part_name(rank)
            listed |= json.loads(part.read_text())
            part.unlink()
        if missed := {path.relative_to(writing).as_posix() for path in files_of(writing)} ^ listed.keys():
            # An OSError, since a slow network file system may show the files a moment later.
            raise OSError(f"not all ranks see these files in {writing}: {', '.join(sorted(missed)[:3])}")
        _write_synced(writing / MANIFEST, manifest_text(step, meta, listed))
        for folder, _, _ in os.walk(writing):
            files.sync(Path(folder))
        # The new `latest` is written before the rename: from there on no step needs space on the disk.
        latest = self.root / f"{NEW_LATEST}{final.name}"
        _write_synced(latest, final.name + "\n")
        os.rename(writing, final)
        try:
            files.sync(self.root)
            os.replace(latest, self.root / LATEST)
        except OSError:
            os.rename(final, writing)
            raise
        files.sync(self.root)
        self._prune()
        return final

    def _save_error(self, step: int, error: Exception | None, reason: str) -> HyperRouterError:
        if isinstance(error, HyperRouterError):
            return error
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(self.root).free / 1e6:.0f} MB are free now)"
        last = pointers.latest_step(self.root)
        name = "" if last is None else folder_name(last)
        return CheckpointError(
            f"the checkpoint of step {step} could not be saved in {self.root}: {reason}",
            remedy=f"free up space on that disk{free}, or choose another --run-dir; "
            + (
                f"then continue from {name} with --load {self.root / name}"
                if name
                else "there is no earlier checkpoint to continue from"
            ),
        )

    def _rewind(self, step: int) -> list[Path]:
        """It may be killed at any point: the folder always allows the same rewind, or a resume, to start
        again.
        """
        if not self._is_main or not self.root.is_dir():
            return []
        if (latest := self.root / LATEST).is_dir() and not latest.is_symlink():
            raise CheckpointError(
                f"{latest} is a folder, but it must be a file that contains the name of a checkpoint",
                remedy="rename that folder",
            )
        later = [folder for folder in sorted(self.root.glob("step_*")) if (step_of(folder) or 0) > step]
        if (pointers.proved_step(self.root) or 0) > step:
            (self.root / pointers.PROVED).unlink()  # another checkpoint of that step will have to be proved
        if step in self.steps():
            # otherwise the next start would continue from a later save
            for unfinished in self.root.glob(f"{NEW_LATEST}*"):
                if unfinished.name != f"{NEW_LATEST}{folder_name(step)}":
                    unfinished.unlink()
            if pointers.latest_step(self.root) != step:
                pointers.publish(self.root, step)
        aside = [self._set_aside(later)] if later else []
        if step not in self.steps():
            (self.root / LATEST).unlink(missing_ok=True)
        self._sweep()
        return aside

    def _set_aside(self, checkpoints: list[Path]) -> Path:
        """A folder that an earlier rewind has already set aside is removed instead: each retry of a run that
        fails at the same step makes such a copy.
        """
        twins = [twin for folder in checkpoints if (twin := self._twin(folder)) is not None]
        if len(twins) == len(checkpoints):
            for folder in checkpoints:
                self._remove(folder)
            return twins[-1].parent
        aside = self._new_aside()
        metrics = self.root.with_name("metrics.jsonl")
        if metrics.exists():
            shutil.copy2(metrics, aside)
        for folder in checkpoints:
            folder.rename(aside / folder.name)
        return aside

    def _new_aside(self) -> Path:
        """Make an empty folder into which checkpoints can be renamed: next to ``root``, or inside it if
        ``root`` is on another file system.
        """
        draft = self.root / f"{_WRITING}aside"
        draft.mkdir(exist_ok=True)  # a killed rewind may have left it
        try:
            return _renamed(draft, self.root.with_name(f"{self.root.name}-earlier-1"))
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        return _renamed(draft, self.root / "earlier-1")

    def _twin(self, folder: Path) -> Path | None:
        """A complete checkpoint that was set aside and whose files have the same checksums."""
        with contextlib.suppress(CheckpointError, OSError, KeyError):
            files_here = read_manifest(folder)["files"]
            beside = self.root.parent.glob(f"{self.root.name}-earlier-*/{folder.name}")
            for other in sorted([*beside, *self.root.glob(f"earlier-*/{folder.name}")]):
                if read_manifest(other)["files"] == files_here and not damage(other, files_here):
                    return other
        return None

    def _prune(self) -> None:
        """Keep the newest checkpoints, the newest that is known to be good, and those of alarms."""
        spared = {pointers.proved_step(self.root), *pointers.kept_steps(self.root)}
        for step in self.steps()[: -self.keep] if self.keep else []:
            if step not in spared and not (self.keep_every and step % self.keep_every == 0):
                with contextlib.suppress(
                    OSError
                ):  # an old checkpoint that cannot be removed must not stop a run
                    self._remove(self.root / folder_name(step))

    def _remove(self, folder: Path) -> None:
        """Renamed first, so that a kill leaves no half of a checkpoint under its real name."""
        doomed = folder.with_name(f"{_REMOVING}{folder.name}")
        folder.rename(doomed)
        shutil.rmtree(doomed)

    def _sweep(self) -> None:
        """Remove what killed saves left; a link by such a name is removed, not followed."""
        for path in self.root.iterdir():
            if path.name.startswith((_WRITING, _REMOVING, NEW_LATEST)) or path.name.endswith(".unfinished"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def verify(folder: Path, ranks: Ranks) -> None:
    """Compare every file with the manifest (collective): CheckpointError names the file that is missing or
    altered.

    The ranks share the reading, since a checksum costs about as much as loading the file.
    """
    error = _attempt(lambda: _verify_share(folder, ranks.place.rank, ranks.place.world_size))
    if ranks.any_rank(error is not None):
        reason = reason_of(ranks, error)
        if isinstance(error, HyperRouterError):
            raise error
        raise CheckpointError(f"{folder} cannot be read: {reason}", remedy=older(folder)) from error


def _verify_share(folder: Path, rank: int, world_size: int) -> None:
    listed = read_manifest(folder)["files"]
    if rank == 0:
        refuse_unlisted(folder, listed)
    if wrong := damage(folder, {name: listed[name] for name in sorted(listed)[rank::world_size]}):
        raise CheckpointError(wrong, remedy=older(folder))


def _attempt(work: Callable[[], object]) -> Exception | None:
    """The exception that ``work`` raised. Any kind is caught, because a rank that left alone would block the
    others in a collective.
    """
    try:
        work()
    except Exception as error:  # noqa: BLE001 - handed to the caller, which raises it
        return error
    return None


def reason_of(ranks: Ranks, error: Exception | None) -> str:
    """The error message of any rank (collective). Only one rank reports to the user, and it is seldom the
    one that failed.
    """
    own = error.message if isinstance(error, HyperRouterError) else str(error) or type(error).__name__
    found = ranks.first_word("" if error is None else f"rank {ranks.place.rank}: {own}")
    return found if error is None else own


def _renamed(folder: Path, first: Path) -> Path:
    """Rename it to ``first``, a name with 1 at its end, or to the next number that is free."""
    stem, number = first.name.removesuffix("1"), 1
    while (target := first.with_name(f"{stem}{number}")).exists():
        number += 1
    return folder.rename(target)


def _write_synced(path: Path, text: str) -> None:
    with files.open_new(path) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
