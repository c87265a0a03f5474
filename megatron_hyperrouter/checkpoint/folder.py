"""Checkpoint folders that are either complete or not there at all.

``root/step_0000100/`` holds one checkpoint and ``root/latest`` the name of the newest one.  A save writes
into a hidden folder, puts every file on disk, seals it with ``manifest.json`` (sizes and checksums),
renames it, and only then replaces ``latest``.  So whatever moment the machine dies at, ``latest`` names a
complete checkpoint.  ``latest`` alone counts: a folder that was renamed but never named by it belongs to
a save that did not happen.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_hyperrouter.errors import CheckpointError, HyperRouterError

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
# what a killed run may leave behind
_WRITING, _REMOVING, _NEW_LATEST = ".writing-", ".removing-", ".latest-"
_PART = ".part-"  # sizes and checksums from one rank, until the manifest joins them
_STEP_NAME = re.compile(r"step_(\d{7,})")
_CHUNK = 1 << 22


class _Place(Protocol):
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...


class Ranks(Protocol):
    """The processes that save together; every engine is one."""

    @property
    def place(self) -> _Place:
        """Which of the ranks this one is."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """True on all ranks when ``flag`` is true on one; waits for every rank."""
        ...

    def first_word(self, word: str) -> str:
        """On all ranks, the word of the first rank that has one; waits for every rank."""
        ...


class CheckpointFolders:
    """The checkpoints of one run, on a file system that every rank sees; methods marked collective need
    every rank.
    """

    def __init__(self, root: Path, ranks: Ranks, *, keep: int = 0) -> None:
        """``keep``: how many of the newest checkpoints stay (0: all)."""
        self.root, self.ranks, self.keep = root, ranks, keep
        self._is_main = ranks.place.rank == 0

    def save(self, step: int, write: Callable[[Path], None], meta: Mapping[str, Any]) -> Path:
        """Save one checkpoint (collective): ``write`` is called with the folder for this rank's files.

        ``meta`` is any JSON mapping; :func:`read_meta` gives it back.  When one rank fails, all raise
        :class:`CheckpointError`, nothing of the new checkpoint stays, and the old ones and ``latest`` are
        as before. ``write`` must not leave the other ranks waiting in a collective when it raises.
        """
        final = self.root / folder_name(step)
        writing = self.root / f"{_WRITING}{final.name}"
        phases: tuple[Callable[[], None], ...] = (
            lambda: self._prepare(writing, final),
            lambda: write(writing),
            lambda: self._seal(writing),
            lambda: self._publish(writing, final, step, meta),
        )
        for phase in phases:
            error = _attempt(phase)
            if self.ranks.any_rank(error is not None):
                reason = _reason(self.ranks, error)
                if self._is_main:
                    shutil.rmtree(writing, ignore_errors=True)
                    (self.root / f"{_NEW_LATEST}{final.name}").unlink(missing_ok=True)
                raise self._save_error(step, error, reason) from error
        if self._is_main:
            self._prune()
        return final

    def rewind(self, step: int) -> Path | None:
        """Make ``step`` the end of this run's history (collective), as 0 when it starts afresh.

        What killed saves left behind is removed.  Later checkpoints that ``latest`` counted belong to
        another course of the run; they are moved to a folder beside ``root``, which the main rank gets
        back (None when there were none).
        """
        aside: list[Path] = []
        error = _attempt(lambda: aside.extend(self._rewind(step)))
        if self.ranks.any_rank(error is not None):
            message = f"{self.root} cannot be prepared: {_reason(self.ranks, error)}"
            raise CheckpointError(
                message, remedy="check its permissions, or give another --run-dir"
            ) from error
        return aside[0] if aside else None

    def steps(self) -> list[int]:
        """Steps of the sealed checkpoints, oldest first."""
        return _sealed_steps(self.root)

    def _prepare(self, writing: Path, final: Path) -> None:
        if not self._is_main:
            return
        if not self.root.is_dir():
            self.root.mkdir(parents=True)
            _sync(self.root.parent)
        self._sweep()
        if final.exists():
            raise CheckpointError(
                f"{final} is already there", remedy="give another --run-dir, or move that folder away"
            )
        writing.mkdir()

    def _seal(self, writing: Path) -> None:
        """Put this rank's share of the files on disk, and note their sizes and checksums."""
        place = self.ranks.place
        files = {}
        for path in _files(writing)[place.rank :: place.world_size]:
            files[path.relative_to(writing).as_posix()] = _fingerprint(path)
            _sync(path)
        _write_synced(writing / f"{_PART}{place.rank}", json.dumps(files))

    def _publish(self, writing: Path, final: Path, step: int, meta: Mapping[str, Any]) -> None:
        if not self._is_main:
            return
        files: dict[str, Any] = {}
        for rank in range(self.ranks.place.world_size):
            part = writing / f"{_PART}{rank}"
            files |= json.loads(part.read_text())
            part.unlink()
        if missed := {path.relative_to(writing).as_posix() for path in _files(writing)} ^ files.keys():
            raise OSError(f"the ranks do not see the same files in {writing}: {sorted(missed)[:3]}")
        manifest = {"format": FORMAT, "step": step, "meta": dict(meta), "files": dict(sorted(files.items()))}
        _write_synced(writing / MANIFEST, json.dumps(manifest, indent=1))
        for folder, _, _ in os.walk(writing):
            _sync(Path(folder))
        # The new `latest` is written before the rename: from there on no step needs space on the disk.
        latest = self.root / f"{_NEW_LATEST}{final.name}"
        _write_synced(latest, final.name + "\n")
        os.rename(writing, final)
        try:
            _sync(self.root)
            os.replace(latest, self.root / LATEST)
        except OSError:
            os.rename(final, writing)
            raise
        _sync(self.root)

    def _save_error(self, step: int, error: Exception | None, reason: str) -> HyperRouterError:
        if isinstance(error, HyperRouterError):
            return error
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(self.root).free / 1e6:.0f} MB are free)"
        last = _latest_name(self.root)
        return CheckpointError(
            f"the checkpoint of step {step} could not be saved in {self.root}: {reason}",
            remedy=f"make room on that disk{free} or give another --run-dir; "
            + (
                f"{last} is untouched, continue from it with --load {self.root / last}"
                if last
                else "no earlier checkpoint exists"
            ),
        )

    def _rewind(self, step: int) -> list[Path]:
        if not self._is_main or not self.root.is_dir():
            return []
        self._sweep()
        published = _latest_name(self.root)
        later = [folder for folder in self.root.glob("step_*") if (_step_of(folder) or 0) > step]
        if published == folder_name(
            step
        ):  # so a later one was renamed by a save that was killed before it was published
            for folder in later:
                self._remove(folder)
            return []
        if step in self.steps():
            latest = self.root / f"{_NEW_LATEST}{folder_name(step)}"
            _write_synced(latest, folder_name(step) + "\n")
            os.replace(latest, self.root / LATEST)
        else:
            (self.root / LATEST).unlink(missing_ok=True)
        return self._set_aside(later) if later else []

    def _set_aside(self, checkpoints: list[Path]) -> list[Path]:
        number = 1
        while (aside := self.root.with_name(f"{self.root.name}-earlier-{number}")).exists():
            number += 1
        aside.mkdir()
        for folder in checkpoints:
            folder.rename(aside / folder.name)
        return [aside]

    def _prune(self) -> None:
        for step in self.steps()[: -self.keep] if self.keep else []:
            with contextlib.suppress(OSError):  # an old checkpoint that stays is no reason to stop a run
                self._remove(self.root / folder_name(step))

    def _remove(self, folder: Path) -> None:
        """Renamed first, so that a kill leaves no half of a checkpoint under its real name."""
        doomed = folder.with_name(f"{_REMOVING}{folder.name}")
        folder.rename(doomed)
        shutil.rmtree(doomed)

    def _sweep(self) -> None:
        for path in self.root.iterdir():
            if path.name.startswith((_WRITING, _REMOVING, _NEW_LATEST)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def folder_name(step: int) -> str:
    """``step_0000100`` for step 100."""
    return f"step_{step:07d}"


def find(load: Path) -> Path | None:
    """The checkpoint that ``load`` means: itself, or the one that ``latest`` names in it or in its
    ``checkpoints/``.

    None where no checkpoint was ever finished.  CheckpointError where ``latest`` names a folder that is
    not there.
    """
    if (load / MANIFEST).is_file():
        return load
    for root in (load / "checkpoints", load):
        if name := _latest_name(root):
            if not (root / name / MANIFEST).is_file():
                raise CheckpointError(
                    f"{root / LATEST} names {name!r}, but {root / name / MANIFEST} is missing",
                    remedy=_older(root / name),
                )
            return root / name
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """``format``, ``step``, ``meta`` and ``files`` of a checkpoint."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        known, _, _ = manifest["format"], int(manifest["step"]), manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}", remedy=_older(folder)) from error
    if known != FORMAT:
        raise CheckpointError(
            f"{path} has format {known}; this program reads format {FORMAT}",
            remedy="use the version that wrote it",
        )
    return dict(manifest)


def read_meta(folder: Path) -> dict[str, Any]:
    """The mapping that was given to :meth:`CheckpointFolders.save`."""
    return dict(read_manifest(folder)["meta"])


def verify(folder: Path, ranks: Ranks) -> None:
    """Compare every file with the manifest (collective): CheckpointError names the file that is missing
    or altered.

    The ranks share the reading, since a checksum costs about as much as loading the file.
    """
    error = _attempt(lambda: _verify_share(folder, ranks.place.rank, ranks.place.world_size))
    if ranks.any_rank(error is not None):
        reason = _reason(ranks, error)
        if isinstance(error, HyperRouterError):
            raise error
        raise CheckpointError(f"{folder} cannot be read: {reason}", remedy=_older(folder)) from error


def _verify_share(folder: Path, rank: int, world_size: int) -> None:
    files = read_manifest(folder)["files"]
    for name in sorted(files)[rank::world_size]:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing", remedy=_older(folder))
        if (found := path.stat().st_size) != files[name]["bytes"]:
            raise CheckpointError(
                f"{path} has {found} bytes, {files[name]['bytes']} were saved", remedy=_older(folder)
            )
        if _fingerprint(path) != files[name]:
            raise CheckpointError(
                f"{path} was altered: its checksum is not the one in {MANIFEST}", remedy=_older(folder)
            )


def _older(folder: Path) -> str:
    """What to do about a damaged checkpoint."""
    step = _step_of(folder)
    older = [other for other in _sealed_steps(folder.parent) if step is not None and other < step]
    if older:
        return f"continue from the checkpoint before it: --load {folder.parent / folder_name(older[-1])}"
    return (
        f"there is no older checkpoint in {folder.parent}; restore the folder from a copy, or start "
        "again without --load"
    )


def _attempt(work: Callable[[], None]) -> Exception | None:
    """The exception that ``work`` raised.  Any kind: a rank that left here alone would hang the others in
    a collective.
    """
    try:
        work()
    except Exception as error:  # noqa: BLE001 - handed to the caller, which raises it
        return error
    return None


def _reason(ranks: Ranks, error: Exception | None) -> str:
    """What went wrong, on whichever rank (collective): one rank alone speaks to the user, and seldom the
    one that failed.
    """
    own = error.message if isinstance(error, HyperRouterError) else str(error) or repr(error)
    found = ranks.first_word("" if error is None else f"rank {ranks.place.rank}: {own}")
    return found if error is None else own


def _step_of(folder: Path) -> int | None:
    match = _STEP_NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def _sealed_steps(root: Path) -> list[int]:
    steps = ((_step_of(path.parent), path) for path in root.glob(f"step_*/{MANIFEST}"))
    return sorted(step for step, _ in steps if step is not None)


def _latest_name(root: Path) -> str:
    try:
        return (root / LATEST).read_text().strip()
    except (OSError, ValueError):
        return ""


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(_PART))


def _fingerprint(path: Path) -> dict[str, Any]:
    """Size and CRC-32: meant against truncation and decay, not against forgery, and twice as fast as
    SHA-256.
    """
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return {"bytes": size, "crc32": f"{checksum:08x}"}


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
