"""Saving in the background: training waits until the tensors are copied, and a thread of each rank does
the rest.

After the copy, the ranks do not communicate over the network until the checkpoint is published.  Each
rank's thread writes its files and then its part file; the main rank's thread waits for the part files of
all ranks, joins them, and publishes the folder.  A rank that fails writes a note into the folder; in case
the disk is full, it also tells the others after the next step.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_hyperrouter.checkpoint.folder import CheckpointFolders, reason_of
from megatron_hyperrouter.checkpoint.manifest import part_name
from megatron_hyperrouter.errors import HyperRouterError

_FAILED = ".part-failed-"
_POLLS = (0.02, 0.5)  # seconds between looks at the folder: the first, and the longest
_LAST_WAIT = 60.0  # seconds, at the end of a run that failed


class Staged(Protocol):
    """What a rank saves, already copied: nothing that training changes reaches it."""

    def write(self, folder: Path) -> list[Path]:
        """Write this rank's files; returns those that the checkpoint keeps."""
        ...

    def join(self, folder: Path) -> None:
        """Finish the folder: the main rank, after all ranks have written."""
        ...


class Failure(NamedTuple):
    """Why a save failed, the same on all ranks."""

    reason: str
    hopeless: bool  # writing the same again would fail again


class CheckpointWriter:
    """Writes one checkpoint at a time; methods marked collective need every rank, in the main thread."""

    def __init__(self, folders: CheckpointFolders) -> None:
        self._folders = folders
        self._job: _Job | None = None
        self._published: list[tuple[int, Path]] = []

    def start(
        self,
        step: int,
        staged: Staged,
        meta: Mapping[str, Any],
        *,
        texts: Mapping[str, bytes] | None = None,
    ) -> None:
        """Begin to write (collective). The previous save must be settled: both use the same memory."""
        if self._job is not None:
            raise RuntimeError("the previous save has not finished")
        writing = self._folders.begin(step, texts)
        self._job = _Job(self._folders, step, writing, staged, meta)
        self._job.thread.start()

    @property
    def failed(self) -> bool:
        """Whether this rank's part of the running save has failed."""
        return self._job is not None and self._job.error is not None

    def published(self) -> list[tuple[int, Path]]:
        """Steps and folders that were published since the last call; only the main rank knows them."""
        if self._job is not None and self._job.folder is not None:
            self._published.append((self._job.step, self._job.folder))
            self._job.folder = None
        found, self._published = self._published, []
        return found

    def settle(self) -> Failure | None:
        """Wait for the running save (collective); if it has failed, remove what it left."""
        job, ranks = self._job, self._folders.ranks
        if job is None:
            return None
        is_main = ranks.place.rank == 0
        if not is_main:
            job.thread.join()
        if ranks.any_rank(job.error is not None):
            job.abandoned.set()  # else the main rank would wait for a part that never comes
        job.thread.join()
        if job.folder is not None:
            self._published.append((job.step, job.folder))
        self._job = None
        if not ranks.any_rank(job.error is not None):
            return None
        hopeless = ranks.any_rank(isinstance(job.error, HyperRouterError))
        reason = reason_of(ranks, None if isinstance(job.error, _Abandoned) else job.error)
        if is_main:
            self._folders.discard(job.step)
        return Failure(reason, hopeless)

    def close(self) -> None:
        """The run is failing: let the save finish if it can, but do not wait for ranks that are gone."""
        if self._job is not None:
            self._job.thread.join(_LAST_WAIT)
            self._job.abandoned.set()
            self._job.thread.join(_LAST_WAIT)


class _Abandoned(Exception):
    """The main rank need not wait for the others any more."""


class _Job:
    def __init__(
        self, folders: CheckpointFolders, step: int, writing: Path, staged: Staged, meta: Mapping[str, Any]
    ) -> None:
        self.step = step
        self.error: Exception | None = None
        self.folder: Path | None = None  # once it is published, on the main rank
        self.abandoned = threading.Event()
        self._folders, self._writing, self._staged, self._meta = folders, writing, staged, meta
        self.thread = threading.Thread(target=self._run, name=f"save-{step}", daemon=True)

    def _run(self) -> None:
        rank = self._folders.ranks.place.rank
        work: Callable[[], None] = self._lead if rank == 0 else self._follow
        try:
            work()
        except Exception as error:  # noqa: BLE001 - the main thread raises it, on all ranks
            self.error = error
            with contextlib.suppress(OSError):  # on a full disk the others learn of it after the next step
                (self._writing / f"{_FAILED}{rank}").write_text(str(error), encoding="utf-8")

    def _follow(self) -> None:
        self._folders.seal(self._writing, self._staged.write(self._writing))

    def _lead(self) -> None:
        self._staged.write(self._writing)
        self._wait_for_others()
        self._staged.join(self._writing)
        self._folders.seal_rest(self._writing)
        self.folder = self._folders.publish(self.step, self._meta)

    def _wait_for_others(self) -> None:
        missing = {part_name(rank) for rank in range(1, self._folders.ranks.place.world_size)}
        pause, longest = _POLLS
        while True:
            names = set(os.listdir(self._writing))
            if failed := sorted(name for name in names if name.startswith(_FAILED)):
                raise _Abandoned(failed[0])
            if missing <= names:
                return
            if self.abandoned.wait(pause):
                raise _Abandoned
            pause = min(pause * 1.5, longest)
