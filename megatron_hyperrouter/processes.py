"""The processes of this package: their environment, their file names, and the processor that they run on."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path

# Set in the environment of ranks that have met: the prefix of their keys in the rendezvous store.
ROUND = "HYPERROUTER_ROUND"
_PARENT = str(Path(__file__).resolve().parent.parent)


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment for ``python -m megatron_hyperrouter...``, with ``more`` variables."""
    path = os.pathsep.join(filter(None, (_PARENT, os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path} | more


def cores() -> int:
    """The CPU cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """The name of the CPU.  Other processors may round sums differently."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def open_standard_streams() -> None:
    """Open /dev/null in place of standard streams that are closed, as after ``>&-``.  Otherwise the next file
    that is opened would get the number of the stream, and the output of a library would go into this file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def restart_in_utf8() -> None:
    """Start this command again in Python's UTF-8 mode if Python reads file names in another encoding.

    Python does so with ``PYTHONUTF8=0`` in the locale C, and in a locale such as ISO-8859-1.  Tokenizers and
    safetensors then cannot open a file with other letters than ASCII in its name, and no JSON or YAML file
    can hold its name.  Output stays in the encoding of the terminal.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1" or not sys.executable:
        return
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:backslashreplace")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
