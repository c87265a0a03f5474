"""The only part of the package that prints to the user during a run, and that turns errors into exit
statuses.

Every rank of a run goes through :func:`run`, but only one rank prints: an error in the settings happens on
all of them.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from megatron_hyperrouter.errors import ConfigError, HostError, HyperRouterError

PATIENCE = 3.0  # seconds; after rank 0 has ended with an error, a launcher kills the other ranks much sooner
SILENCE = 60.0  # seconds of waiting for other ranks before a note is printed
# Words in the errors of gloo, NCCL and the rendezvous store if another rank has ended.
_LOST_A_RANK = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exit",
    "Failed to recv, got 0 bytes",
    "Connection was likely closed",
)


class EndedByLauncher(SystemExit):
    """The launcher has asked this rank to end, because another rank has failed and reports the reason."""


def run(main: Callable[[], object], *, patience: float = PATIENCE) -> int:
    """Call ``main`` and return the exit status of the public contract: the integer that ``main`` returns, or
    0 if it returns anything else.  Rank 0 reports an error at once.

    Another rank waits ``patience`` seconds before it reports an error.  If rank 0 has the same error, the
    launcher ends this process first; otherwise this rank reports it.
    """
    status: object = 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
    except HyperRouterError as error:
        # Settings are the same on all ranks.  If rank 0 has not reported the error yet, it is still
        # importing, for example from a slow disk.
        _take_turn(10 * patience if isinstance(error, ConfigError) else patience)
        report(error)
        return error.exit_status
    except ModuleNotFoundError as error:
        _take_turn(patience)
        return _missing_module(error)
    except EndedByLauncher:
        # End by the launcher's signal: an exit status would hide that of the rank that failed.
        for stream in (sys.stdout, sys.stderr):
            _let_go(stream)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
        return 1
    except KeyboardInterrupt:
        warn("interrupted")
        return 1
    except MemoryError as error:
        _take_turn(patience)
        report(out_of_memory(error))
        return 1
    except Exception as error:  # noqa: BLE001 - every remaining error is reported here; none is hidden
        # A rank that lost its connection does not know why.  The rank that has ended does, and may still be
        # waiting for its turn to report.
        _take_turn(patience, left_alone=left_alone(error))
        _say(sys.stderr, "error", traceback.format_exc().rstrip(), "bold red", fold=False)
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            _let_go(stream)
    return status if isinstance(status, int) else 0


def left_alone(error: Exception) -> bool:
    """Whether the error only means that another rank has ended."""
    return any(words in str(error) for words in _LOST_A_RANK)


@contextlib.contextmanager
def waiting_for_ranks(world_size: int) -> Iterator[None]:
    """Within this context, a wait of more than ``SILENCE`` is reported."""
    words = (
        f"waiting for all {world_size} ranks to join; one of them may have exited, or may be "
        "building an index file (mhr index builds index files in advance)"
    )
    timer = threading.Timer(SILENCE, note, [words])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def report(error: HyperRouterError) -> None:
    """Print a user's error, with its remedy, to stderr."""
    _say(sys.stderr, "error", str(error), "bold red")


def missing_library(error: ModuleNotFoundError) -> HostError:
    """The error to report if an import fails."""
    library = (error.name or "").split(".")[0]
    return HostError(
        f"the {library} library is not installed ({error})",
        remedy="in the repository, run bash tools/setup_env.sh or pip install . to install all libraries",
    )


def out_of_memory(error: MemoryError) -> HyperRouterError:
    """The error to report if the machine has no memory left."""
    reason = f": {error}" if str(error) else ""
    remedy = "free some memory, or use smaller sizes (such as --micro-batch-size or --workers)"
    return HyperRouterError(f"not enough memory{reason}", remedy=remedy)


def note(text: str) -> None:
    """Print a note once: on rank 0, to stdout."""
    if speaks():
        # A note may end with a command to copy, which must stay on one line.
        _say(sys.stdout, "note", text, "bold", fold=False)


def warn_from_here(text: str) -> None:
    """Print a warning on this rank, even if it is not rank 0."""
    _say(sys.stderr, "warning", text, "bold yellow")


def error_from_here(text: str) -> None:
    """Print an error on this rank, even if it is not rank 0."""
    _say(sys.stderr, "error", text, "bold red")


def warn(text: str) -> None:
    """Print a warning once: on rank 0, to stderr."""
    if speaks():
        _say(sys.stderr, "warning", text, "bold yellow")


def table(rows: Sequence[tuple[str, str]]) -> None:
    """Print several labelled lines on rank 0, to stdout, with the labels in a column."""
    if speaks():
        width = max(len(label) for label, _ in rows)
        for label, text in rows:
            _print(sys.stdout, f"{label:<{width}}  ", text, "bold", indent=width + 2)


def say_at_once(text: str) -> None:
    """Print a note from inside a signal handler, on rank 0; unbuffered, because the buffers may be in use."""
    if speaks():
        with contextlib.suppress(OSError):
            os.write(2, f"\nnote: {text}\n".encode())


def speaks() -> bool:
    """True on the one rank that prints; always True without a launcher."""
    return _rank() == "0"


def _say(stream: TextIO, kind: str, text: str, style: str, *, fold: bool = True) -> None:
    who = kind if speaks() else f"{kind} (rank {_rank()})"
    _print(stream, f"{who}: ", text, style, indent=2 if fold else None)


def _print(stream: TextIO, head: str, text: str, style: str, *, indent: int | None = None) -> None:
    if indent is not None and (width := _width(stream)):
        text = folded(head, text, width, indent)
    if hasattr(stream, "rich_proxied_file"):  # a progress bar is on the screen; it stays below this text
        with contextlib.suppress(OSError, ValueError, SystemExit):
            stream.write(f"{head}{text}\n")
        return
    try:
        from rich.console import Console
        from rich.text import Text
    except ModuleNotFoundError:  # rich may be the missing library to report
        stream.write(f"{head}{text}\n")
    else:
        # The reader may have closed the pipe (rich then raises SystemExit), or the disk may be full.
        with contextlib.suppress(OSError, ValueError, SystemExit):
            Console(file=stream).print(Text.assemble((head, style), text), soft_wrap=True, highlight=False)


def folded(head: str, text: str, width: int, indent: int) -> str:
    """``text``, to be printed after ``head``, in lines of at most ``width`` columns that end between words.
    A line that continues another is indented by ``indent`` more columns.  A longer word stays whole.
    """
    lines, first = [], " " * len(head)
    for line in text.split("\n"):
        start = line[: len(line) - len(line.lstrip())]
        if line.lstrip().startswith("remedy: "):  # it may contain a command to copy
            lines.append(first + line)
            first = ""
            continue
        folds = textwrap.wrap(
            line.strip(),
            width,
            initial_indent=first + start,
            subsequent_indent=start + " " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += folds or [first]
        first = ""
    return "\n".join(lines)[len(head) :]


def _width(stream: TextIO) -> int:
    """Columns of the terminal behind ``stream``; 0: there is none, or it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (AttributeError, OSError, ValueError):  # no file, or no terminal
        return 0


def _let_go(stream: TextIO) -> None:
    """Flush the output; if that fails, keep Python from trying again when it exits."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _rank() -> str:
    return os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"


def _take_turn(patience: float, *, left_alone: bool = False) -> None:
    if left_alone or not speaks():
        # with the run's own handler, this process would not end when the launcher asks it to
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(8 * patience if left_alone else patience)


def _missing_module(error: ModuleNotFoundError) -> int:
    if (error.name or "").split(".")[0] in ("", "megatron_hyperrouter"):  # a bug in this package
        _say(sys.stderr, "error", traceback.format_exc().rstrip(), "bold red", fold=False)
        return 1
    missing = missing_library(error)
    report(missing)
    return missing.exit_status
