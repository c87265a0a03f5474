"""Requests to stop: signals of a user, a scheduler or a launcher, after which a run saves and ends.

A request takes effect after the current step, on all ranks; such a run ends with the exit status
``errors.STOPPED``.  If the launcher has died, the current step is dropped instead.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from megatron_hyperrouter import console

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")
# Launchers pass on a Ctrl-C that the terminal has already sent to every rank: this is not a second Ctrl-C.
_ECHO = 2.0  # seconds


class StopRequest:
    """Whether this rank was asked to stop, and by what.

    Plain attributes: a signal handler must not take a lock, as ``threading.Event`` does.
    """

    def __init__(self) -> None:
        self.reason = ""  # "SIGTERM"; empty until somebody asks
        self.at_once = False  # the current step does not count
        self._when = 0.0

    @property
    def came(self) -> bool:
        """True once there was a request."""
        return bool(self.reason)

    def ask(self, reason: str, *, at_once: bool = False) -> None:
        """Ask for a stop; the first reason counts."""
        if not self.reason:
            self.reason, self._when = reason, time.monotonic()
        self.at_once = self.at_once or at_once

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Record a signal; a second Ctrl-C ends the process at once."""
        if not self.reason:
            self.ask(signal.Signals(number).name)
            if number == signal.SIGINT:
                console.say_at_once(
                    "stopping after this step; a checkpoint will be saved (press Ctrl-C again to end at once)"
                )
        elif number == signal.SIGINT and time.monotonic() - self._when > self._echo():
            raise KeyboardInterrupt

    @staticmethod
    def _echo() -> float:
        return (
            _ECHO if int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))) > 1 else 0.0
        )


@contextlib.contextmanager
def stop_signals(request: StopRequest, *, enabled: bool) -> Iterator[StopRequest]:
    """Within this context, the signals of ``SIGNALS`` ask for a stop instead of ending the process.

    A signal that the process ignores stays ignored, as SIGHUP under ``nohup``.
    """
    # Only the main thread may handle signals.
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    asked = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in asked:
        signal.signal(number, request.on_signal)
    try:
        yield request
    finally:
        for number in asked:
            signal.signal(number, before[number])


def ignore_signals() -> None:
    """From now on signals are ignored, because the process has saved and is about to exit."""
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
