"""A thread of each rank that notices what its training loop cannot notice: a rank that hangs, a dead
launcher.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType

from megatron_hyperrouter import console
from megatron_hyperrouter.errors import reason_of
from megatron_hyperrouter.guard.events import FILE, EventsFile
from megatron_hyperrouter.guard.heartbeat import (
    FOLDER,
    SECONDS,
    Beat,
    Progress,
    beat_of,
    read_beats,
    write_beat,
    writes_file,
)
from megatron_hyperrouter.guard.launcher import Launcher
from megatron_hyperrouter.guard.stopping import StopRequest

_NOTE_AFTER = 60.0  # seconds without progress before the user is notified
_FIRST_STEP = 1800.0  # seconds: kernels are compiled and caches filled in it
_LAST_WORDS = 2.0  # seconds in which every rank writes its stacks before a launcher ends them all
_SLICE = 0.5  # seconds within which the thread notices that training has ended
_SHARE = 0.9  # of the limit: the name of the rank comes before the first collective fails


class Watchdog:
    """Beats, reads the beats of the others, and ends a run that hangs with status 1 and the rank's name."""

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        world_size: int,
        limit: float,
        progress: Progress,
        stop: StopRequest,
        launcher: Launcher,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """``limit``: seconds without progress after which the run ends; more until the first step is done."""
        self._folder = run_dir / FOLDER
        self._rank, self._world_size, self._limit = rank, world_size, limit
        self._progress, self._stop, self._launcher, self._end = progress, stop, launcher, end
        self._first, self._pause = progress.step, min(SECONDS, limit / 10)
        self._writes = writes_file(rank, world_size, int(os.environ.get("LOCAL_RANK", "0")))
        # Of each rank: the time in its newest beat, and when this rank saw it, by its own clock.
        self._heard: dict[int, tuple[float, float]] = {}
        self._noted = self._unwritable = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(timeout=SECONDS)

    def look(self) -> None:
        """One round: write the heartbeat, check whether the launcher is alive, check whether there is
        progress.
        """
        self._launcher.tell(self._stop)
        self._beat()
        still = time.monotonic() - self._progress.moved
        beats = read_beats(self._folder, self._world_size) if self._world_size > 1 else {}
        self._listen(beats)
        limit = self._limit if self._progress.step > self._first else max(self._limit, _FIRST_STEP)
        if still > _SHARE * limit:
            self._give_up(beats, still)
        elif still > min(_NOTE_AFTER, limit / 2):
            if not self._noted and self._speaks(beats):
                console.warn_from_here("no progress: " + "; ".join(self._suspects(beats)))
            self._noted = True
        else:
            self._noted = False

    def _watch(self) -> None:
        pause = self._pause
        while not self._over.is_set():
            self.look()
            until = time.monotonic() + pause
            while not self._over.is_set() and time.monotonic() < until and not self._launcher.is_gone():
                self._launcher.wait(min(_SLICE, pause))
            if self._launcher.is_gone() and self._stop.came:
                self._over.wait(pause)

    def _beat(self) -> None:
        if not self._writes:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_beat(self._folder, self._own_beat())
        except OSError as error:  # training continues without it
            if not self._unwritable:
                console.warn_from_here(f"heartbeats cannot be written to {self._folder}: {reason_of(error)}")
            self._unwritable = True

    def _own_beat(self) -> Beat:
        frame = main_frame()
        return beat_of(self._progress, self._rank, where_is(frame), waits_for_others(frame), self._pause)

    def _listen(self, beats: Mapping[int, Beat]) -> None:
        """Record when each beat was new, by this rank's clock, because the clocks of nodes differ."""
        for rank, beat in beats.items():
            if rank not in self._heard or self._heard[rank][0] != beat.time:
                self._heard[rank] = (beat.time, time.monotonic())

    def _silent(self, rank: int) -> float:
        """Seconds since the last beat of this rank."""
        return time.monotonic() - self._heard[rank][1]

    def _lost(self, beats: Mapping[int, Beat]) -> list[int]:
        return [rank for rank in beats if rank != self._rank and self._silent(rank) > 0.4 * self._limit]

    def _speaks(self, beats: Mapping[int, Beat]) -> bool:
        """Whether this is the first rank that is alive, which reports for all."""
        return self._rank == min({self._rank, *beats} - set(self._lost(beats)))

    def _suspects(self, beats: Mapping[int, Beat]) -> list[str]:
        """One line for each rank for which the others are waiting."""
        if lost := self._lost(beats):
            silent = "this rank has been silent for"
            return [f"{describe(beats[rank])}; {silent} {self._silent(rank):.0f} s" for rank in lost]
        now = {**beats, self._rank: self._own_beat()}
        return [describe(now[rank]) for rank in apart(now)] or [
            f"all ranks are stuck at the same point: {describe(now[self._rank])}"
        ]

    def _record(self, still: float, suspects: list[str]) -> None:
        with contextlib.suppress(OSError):
            EventsFile(self._folder.with_name(FILE)).write(
                "failure",
                self._progress.step,
                error="Hang",
                message=f"no progress for {still:.0f} s: {'; '.join(suspects)}",
                status=1,
                rank=self._rank,
            )

    def _give_up(self, beats: Mapping[int, Beat], still: float) -> None:
        if speaks := self._speaks(beats):
            suspects = self._suspects(beats)
            lines = "\n  ".join(suspects)
            self._record(still, suspects)
            console.error_from_here(
                f"no progress for {still:.0f} s (--distributed-timeout-minutes):\n  {lines}\n"
                "  remedy: check the machines of these ranks and the stack traces below, then continue "
                "with --load"
            )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        time.sleep(_LAST_WORDS if speaks else 3 * _LAST_WORDS)
        self._end(1)


def apart(beats: Mapping[int, Beat]) -> list[int]:
    """The ranks that delay the others: those that are a step behind; else those that do not wait for
    another rank; else those in another phase than most.  Empty if they cannot be distinguished.
    """
    phases = Counter(beat.phase for beat in beats.values())
    usual = phases.most_common(1)[0][0]
    behind = [rank for rank, beat in beats.items() if beat.step < max(each.step for each in beats.values())]
    busy = [rank for rank, beat in beats.items() if not beat.waits]
    other = [rank for rank, beat in beats.items() if beat.phase != usual]
    return next((found for found in (behind, busy, other) if 0 < len(found) < len(beats)), [])


def describe(beat: Beat) -> str:
    """``rank 1 (host, pid 123) has been in step 57, data, for 300 s, at read (loader.py:80)``."""
    return (
        f"rank {beat.rank} ({beat.host}, pid {beat.pid}) has been in step {beat.step + 1} "
        f"({beat.phase}) for {beat.time - beat.since:.0f} s, at {beat.where}"
    )


def main_frame() -> FrameType | None:
    """Where the main thread is."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def where_is(frame: FrameType | None) -> str:
    """``function (file.py:12)`` of the innermost frame."""
    if frame is None:
        return "?"
    code = frame.f_code
    return f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"


def waits_for_others(frame: FrameType | None) -> bool:
    """Whether the frame is inside a collective."""
    while frame is not None:
        if frame.f_code.co_filename.endswith("distributed_c10d.py"):
            return True
        frame = frame.f_back
    return False
