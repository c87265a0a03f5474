"""When a run saves, without waiting for the disk: every N steps, every X minutes, and on request."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_hyperrouter import console
from megatron_hyperrouter.checkpoint.folder import CheckpointFolders
from megatron_hyperrouter.checkpoint.writer import CheckpointWriter
from megatron_hyperrouter.engines.base import GIVE_UP
from megatron_hyperrouter.errors import CheckpointError
from megatron_hyperrouter.train.health import CheckpointHealth

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.engines.base import Engine
    from megatron_hyperrouter.guard.stopping import StopRequest

_STARTED = time.monotonic()  # start of the program, nearly: this is imported before any data are read
_EVERY = 30.0  # minutes between saves, if the settings do not say
_NONE = -1  # no step


class Wish(NamedTuple):
    """What has to be done after a step, the same on all ranks."""

    stop: str  # what stops the run; empty: nothing
    save: bool  # it is time to save


NOTHING = Wish("", save=False)


class Saving:
    """The checkpoints of one run; methods marked collective need every rank.

    The main rank's clock counts.  If only one rank knows something (its writer failed, it is time to
    save), it tells the others by the flag that every step adds up: see :meth:`asks` and :meth:`answer`.
    """

    def __init__(
        self,
        engine: Engine,
        config: RunConfig,
        *,
        texts: Mapping[str, bytes],
        meta: Callable[[int], Mapping[str, Any]],
        saved: Callable[[int, Path], None],
        remedy: Callable[[], str],
        begun: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``texts``: further files of each checkpoint; ``meta``: what the manifest says about a step;
        ``saved``: called on the main rank after each save; ``remedy``: what to do when the weights are
        ruined; ``begun``: the step of the checkpoint that the run begins with.
        """
        self._engine, self._settings = engine, config.checkpoint
        self.folders = CheckpointFolders(
            Path(config.logging.run_dir) / "checkpoints",
            engine,
            keep=self._settings.keep_checkpoints,
            keep_every=self._settings.keep_every,
        )
        self._texts = texts
        self._meta, self._saved, self._remedy, self._clock = meta, saved, remedy, clock
        self.health = CheckpointHealth(self.folders, step=begun)
        self._writer = CheckpointWriter(self.folders)
        self._last_save = clock()
        self._to_keep: set[int] = set()
        self._covered = _NONE  # the step of the newest save that was begun and has not failed
        minutes = self._settings.save_interval_minutes
        self._interval = (
            60 * (0.0 if self._settings.save_interval else _EVERY) if minutes is None else 60 * minutes
        )

    def asks(self, request: StopRequest) -> int:
        """Whether this rank has something to tell the others after the step, or, with ``GIVE_UP``, instead
        of it; asks for a stop when the program has run for its time.
        """
        limit = self._settings.exit_duration_in_mins
        if self._engine.place.is_main and limit is not None and self._clock() - _STARTED >= 60 * limit:
            request.ask("--exit-duration-in-mins")
        return GIVE_UP if request.at_once else request.came or self._writer.failed or self._late()

    def answer(self, step: int, request: StopRequest) -> Wish:
        """Some rank has asked (collective): what all ranks have to do now."""
        tells = self._engine.any_rank
        if tells(self._writer.failed):
            self.settle(step)
        if tells(request.came):
            return Wish(self._engine.first_word(request.reason), save=False)
        return Wish("", save=tells(self._late()))

    def is_due(self, step: int) -> bool:
        """Whether --save-interval asks for a checkpoint of this step."""
        return self._settings.save_interval > 0 and step % self._settings.save_interval == 0

    def stops_at(self, step: int) -> str:
        """Why the run ends after this step, by --exit-interval; empty if it continues."""
        interval = self._settings.exit_interval
        return "--exit-interval" if interval is not None and step % interval == 0 else ""

    def save(self, step: int, *, wait: bool = False) -> None:
        """Write a checkpoint (collective); ``wait``: until it is published, as always with
        --no-async-save.
        """
        self.settle(step)
        if self._covered != step:
            self._last_save = self._clock()
            if self._settings.async_save:
                self._writer.start(step, self._engine.stage(), self._meta(step), texts=self._texts)
                self._covered = step
            else:
                self._save_now(step)
        if wait:
            self.settle(step)

    def keep(self, step: int) -> None:
        """Never remove the checkpoint of this step, which was just begun or saved."""
        self._to_keep.add(step)
        if step in self.folders.steps():
            self.folders.keep_newest_until(step)

    def poll(self) -> None:
        """Report the checkpoints that were published meanwhile."""
        for step, folder in self._writer.published():
            if step in self._to_keep:
                self.folders.keep_newest_until(step)
            self.health.after_save(step)
            self._saved(step, folder)

    def settle(self, step: int) -> None:
        """Wait for the running save (collective); if it failed, try once more at the current ``step``."""
        failure = self._writer.settle()
        self.poll()
        if failure is None:
            return
        failed, self._covered = self._covered, _NONE
        if failure.hopeless:
            raise CheckpointError(
                f"the checkpoint of step {failed} was not saved: {failure.reason}", remedy=self._remedy()
            )
        if self._engine.place.is_main:
            console.warn(
                f"the checkpoint of step {failed} could not be saved "
                f"({failure.reason}); saving step {step} instead"
            )
        self._save_now(step)
        if failed in self._to_keep:
            self.keep(step)

    def close(self) -> None:
        """Close the saving, however the run ends."""
        self._writer.close()

    def _save_now(self, step: int) -> None:
        staged = self._engine.stage()
        folder = self.folders.save(step, staged.write, self._meta(step), texts=self._texts, join=staged.join)
        self._covered = step
        self.health.after_save(step)
        if self._engine.place.is_main:
            self._saved(step, folder)

    def _late(self) -> bool:
        waited = self._clock() - self._last_save
        return self._engine.place.is_main and 0 < self._interval <= waited
