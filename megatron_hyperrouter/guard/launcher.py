"""The process that started this rank: if it dies, nothing else would end the rank."""

from __future__ import annotations

import contextlib
import os
import select
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_hyperrouter.guard.stopping import StopRequest

_SHELLS = ("sh", "bash", "dash", "zsh", "fish", "ksh", "tcsh")
# in the first words of a command: its name, or a module of Python
_LAUNCHERS = (
    *("deepspeed", "torchrun", "torch.distributed", "accelerate", "ft_launcher"),
    *("mpirun", "mpiexec", "orted", "prted", "hydra_pmi", "slurmstepd"),
)
_HIGHEST = 6  # processes above this one
_EXITING = 0x4  # PF_EXITING of Linux: the process is being taken down, and its parent does not know yet


@dataclass(frozen=True)
class Launcher:
    """The launcher's processes above this one: ids, each with the id of its parent at the start."""

    line: tuple[tuple[int, int], ...]  # from this process up; empty: there is none to watch

    @staticmethod
    def of_this_process() -> Launcher:
        """The parent process, if a launcher has set RANK, and all processes of ``deepspeed`` above it.

        Call this first: a launcher that dies before this call is not found, and the program itself sets
        RANK later.

        A shell does not count: it may start ranks in the background and end, and they continue.  If a
        launcher started the shell, that launcher counts.  ``deepspeed`` starts one process that starts the
        ranks; when ``deepspeed`` gets SIGTERM, it ends without ending that process.
        """
        if "RANK" not in os.environ:
            return Launcher(())
        line: list[tuple[int, int]] = []
        process, through_a_shell = os.getpid(), False
        for _ in range(_HIGHEST):
            above = _parent(process)
            if above is None or above <= 1:
                break
            words = _command(above)
            shell = _is_shell(words)
            if not shell and (line or through_a_shell) and not _is_launcher(words):
                break
            if not shell:
                line.append((process, above))
                if "deepspeed" not in " ".join(words):
                    break
            through_a_shell = through_a_shell or shell
            process = above
        return Launcher(tuple(line))

    def is_gone(self) -> bool:
        """True once one of these processes has another parent than at the start, or its parent is exiting.

        A process that has loaded torch takes up to 0.1 s to exit, and its children get another parent only
        at the end.
        """
        return any(
            _parent(process) not in (parent, None) or _is_exiting(parent) for process, parent in self.line
        )

    def tell(self, request: StopRequest) -> None:
        """Request a stop if the launcher is gone: the current step must not count."""
        if self.is_gone():
            request.ask("the end of the launcher", at_once=True)

    def wait(self, seconds: float) -> None:
        """Sleep; wake up early if the launcher ends, on systems that can report this."""
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


def start_of_torchrun() -> float:
    """When the torchrun above this process was started, in seconds since 1970; 0 if there is none."""
    process = _parent(os.getpid())
    while process:  # a container's first process may be torchrun; above it is 0
        words = _command(process)[:4]
        if any(Path(word).name == "torchrun" or word.startswith("torch.distributed.") for word in words):
            return _started(process)
        process = _parent(process)
    return 0.0


def _started(process: int) -> float:
    """See proc(5): a process counts from the start of the machine, in ticks of the clock."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        booted = Path("/proc/stat").read_text(encoding="utf-8").partition("\nbtime ")[2].split()[0]
        return int(booted) + (_field(process, 19) or 0) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _parent(process: int) -> int | None:
    """None if it is unknown: the process has ended, or the system has no /proc."""
    return os.getppid() if process == os.getpid() else _field(process, 1)


def _is_exiting(process: int) -> bool:
    return bool((_field(process, 6) or 0) & _EXITING)


def _field(process: int, number: int) -> int | None:
    """Of ``pid (name) state parent group session terminal its-group flags ...``, counted from the state."""
    try:  # the name may hold anything
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[number])
    except (OSError, ValueError, IndexError):
        return None


def _command(process: int) -> list[str]:
    """The words of its command line; none where they cannot be read."""
    try:
        text = Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rstrip("\0").split("\0")


def _is_shell(words: list[str]) -> bool:
    """Whether it is a shell, except the one in which ``deepspeed`` starts its process on another node."""
    name = Path(words[0]).name.lstrip("-") if words else ""
    return name in _SHELLS and "deepspeed.launcher.launch" not in " ".join(words)


def _is_launcher(words: list[str]) -> bool:
    return any(name in word for word in words[:4] for name in _LAUNCHERS)
