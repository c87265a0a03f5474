"""What every command except training shares: exit statuses, stopping on signals, flags, and progress."""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import NoReturn, TypeVar

from megatron_hyperrouter import console
from megatron_hyperrouter.errors import HostError, HyperRouterError
from megatron_hyperrouter.flags import HelpFormatter
from megatron_hyperrouter.flags import Parser as Parser  # the commands take it from here

_SECONDS_BETWEEN_LINES, _MOST_SECONDS_BETWEEN_LINES, _SECONDS_BETWEEN_UPDATES = 5.0, 120.0, 1.0
_PATIENCE = 3.0  # seconds


Shown = TypeVar("Shown", bound="Bar")


class Stopped(BaseException):
    """A signal asks the tool to stop; no ``except Exception`` catches it, every ``finally`` runs."""

    left = "incomplete files were removed"


def run_tool(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Run ``main(arguments)`` and end the process with the status of the public contract, reporting
    errors on stderr.

    0 done, 2 settings, 3 data, 4 checkpoint, 5 missing library, 1 anything else.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # started by nohup, or in the background of a script
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # characters that the terminal cannot show, file names that are not UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except HyperRouterError as error:
        if os.environ.get("RANK", "0") != "0":
            # if rank 0 has the same error, the launcher ends this process before it reports it again
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(_PATIENCE)
        console.report(error)
        sys.exit(error.exit_status)
    except ModuleNotFoundError as error:
        console.report(console.missing_library(error))
        sys.exit(HostError.exit_status)
    except MemoryError as error:
        console.report(console.out_of_memory(error))
        sys.exit(1)
    except Stopped as reason:
        console.error_from_here(f"stopped by {reason}; {reason.left}")
        sys.exit(1)
    except BrokenPipeError:  # the reader has closed the pipe, as in "mhr inspect P | head -1"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = f"{error.filename or 'the output'} cannot be written: {error.strerror}"
        console.report(HyperRouterError(what, remedy="free up space, and run the command again"))
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


def _stop(number: int, frame: FrameType | None) -> None:
    for again in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(again, signal.SIG_IGN)  # a second signal must not interrupt the clean-up
    raise Stopped(signal.Signals(number).name)


def parser(description: str, epilog: str = "") -> Parser:
    """A command-line parser in the style of all tools; a wrong flag ends with status 2."""
    flags = Parser(
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    # the deepspeed launcher adds this flag
    flags.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return flags


def counted(number: int, noun: str) -> str:
    """``1 document``, ``2,000 documents``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def show(text: str) -> None:
    """Print a result on stdout."""
    print(text)


def note(text: str) -> None:
    """Print information for the user on stderr."""
    print(text, file=sys.stderr, flush=True)


class Bar:
    """Progress on stderr: a bar with speed and remaining time on a terminal, a line now and then elsewhere.

    ``unit``: "MB" (``done`` and ``total`` are bytes) or a plural noun.
    """

    def __init__(self, name: str, unit: str = "MB") -> None:
        self._name, self._unit = name, unit
        self._scale = 1e6 if unit == "MB" else 1
        self._start = self._told = self._asked = time.monotonic()
        self._pause = _SECONDS_BETWEEN_LINES  # grows: a run of days prints hundreds of lines
        self._before = 0.0
        self._stack = ExitStack()

    def __enter__(self: Shown) -> Shown:
        self._show: Callable[[float, float, str], None] | None = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            # the numbers come first: they fit into 80 characters
            columns = (
                TextColumn("{task.fields[status]}"),
                BarColumn(),
            )
            bar = self._stack.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
            task = bar.add_task(self._name, status="")
            self._show = lambda done, total, note: bar.update(
                task, completed=done, total=total, status=self._status(done, total, note)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def is_due(self) -> bool:
        """Whether an update would be shown now; for callers that need time to compute it."""
        pause = _SECONDS_BETWEEN_UPDATES if self._show is not None else self._pause
        due = time.monotonic() - self._asked >= pause
        if due:
            self._asked = time.monotonic()
        return due

    def begin_at(self, done: float) -> None:
        """``done`` was finished before this process started: it is progress, but does not count as speed."""
        self._before = done

    def update(self, done: float, total: float, note: str = "") -> None:
        """Show that ``done`` of ``total`` are finished; ``note``: text to add."""
        if self._show is not None:
            self._show(done, total, note)
        elif time.monotonic() - self._told >= self._pause:
            self._told = time.monotonic()
            self._pause = min(1.5 * self._pause, _MOST_SECONDS_BETWEEN_LINES)
            print(f"{self._name}: {self._status(done, total, note)}", file=sys.stderr, flush=True)

    def speed(self, done: float) -> float:
        """Units a second since the start."""
        return (done - self._before) / self._scale / self.seconds()

    def seconds(self) -> float:
        """Time since the start, never 0."""
        return max(time.monotonic() - self._start, 1e-9)

    def _status(self, done: float, total: float, note: str = "") -> str:
        passed = done - self._before
        left = round((total - done) / passed * self.seconds()) if passed > 0 else None
        left_text = (
            "time left unknown"
            if left is None
            else f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left (ETA)"
        )
        digits = 1 if self._unit == "MB" else 0
        amounts = f"{done / self._scale:,.{digits}f} of {total / self._scale:,.{digits}f} {self._unit}"
        return f"{amounts}, {self.speed(done):,.1f} {self._unit}/s, {note}{', ' if note else ''}{left_text}"
