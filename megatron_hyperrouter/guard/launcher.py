"""The process that started this rank: when it dies, nobody would end the rank any more."""

from __future__ import annotations

import contextlib
import os
import select
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Launcher:
    """The launcher's processes above this one: ids, each with the id of its parent at the start."""

    line: tuple[tuple[int, int], ...]  # from this process up; empty: nobody to watch

    @staticmethod
    def of_this_process() -> Launcher:
        """The parent, where a launcher has set RANK; and whatever of ``deepspeed`` is above it.

        To be asked before anything else sets RANK.

        ``deepspeed`` starts one process that starts the ranks, and dies alone when it is told to end.
        """
        if "RANK" not in os.environ:
            return Launcher(())
        line = [(os.getpid(), os.getppid())]
        while "deepspeed" in _command(line[-1][1]) and len(line) < 4:
            above = _parent(line[-1][1])
            if above is None or above <= 1 or "deepspeed" not in _command(above):
                break
            line.append((line[-1][1], above))
        return Launcher(tuple(line))

    def is_gone(self) -> bool:
        """True once one of these processes has another parent than at the start."""
        return any(_parent(process) not in (parent, None) for process, parent in self.line)

    def wait(self, seconds: float) -> None:
        """Sleep, but no longer than the launcher lives, where the system can tell at once."""
        with contextlib.ExitStack() as stack:
            watched = []
            for _, parent in self.line:
                with contextlib.suppress(OSError, AttributeError):  # dead already; not Linux
                    watched.append(os.pidfd_open(parent))
                    stack.callback(os.close, watched[-1])
            if watched:
                select.select(watched, [], [], seconds)
            else:
                time.sleep(seconds)


def _parent(process: int) -> int | None:
    """None where it cannot be told: the process has ended, or the system has no /proc."""
    if process == os.getpid():
        return os.getppid()
    try:
        # "pid (name) state parent ..."; the name may hold anything
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
