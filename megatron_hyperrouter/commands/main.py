"""``mhr NAME ...``: finds the command and starts it.  ``tools/*.py`` start their commands here, too."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from megatron_hyperrouter.commands.names import GROUPS, Command
from megatron_hyperrouter.errors import ConfigError, Problem
from megatron_hyperrouter.processes import open_standard_streams, restart_in_utf8

_COMMANDS: dict[str, Command] = {
    name: command for group in GROUPS.values() for name, command in group.items()
}
_NEXT = """megatron_hyperrouter pretrains mixture-of-experts models with better routers.

Start with one of these:
  bash examples/quickstart.sh   train a small model in 5 minutes (needs a checkout of the repository)
  mhr train --help              every setting of a training run
  mhr evaluate --help           evaluate a trained model at several values of k
  mhr --help                    all commands
"""


def mhr() -> NoReturn:
    """The console script: runs the command that the first argument names."""
    open_standard_streams()
    words = sys.argv[1:]
    if not words:
        _show(_NEXT)
    if words[0] in ("-h", "--help", "help"):
        _show(overview())
    if words[0] == "--version":
        from megatron_hyperrouter import __version__

        _show(f"megatron_hyperrouter {__version__}\n")
    if words[0] not in _COMMANDS:
        from megatron_hyperrouter import console

        error = _unknown(words[0])
        console.report(error)
        sys.exit(error.exit_status)
    sys.argv = [f"mhr {words[0]}", *words[1:]]
    start(words[0])


def start(name: str) -> NoReturn:
    """Run the command ``name`` with ``sys.argv[1:]`` and end the process with its exit status."""
    open_standard_streams()  # tools/*.py come here at once
    restart_in_utf8()
    from megatron_hyperrouter.compat.host_logs import silence_imports

    silence_imports()
    main = import_module(f"megatron_hyperrouter.commands.{_COMMANDS[name].module}").main
    if name == "train":
        from megatron_hyperrouter import console

        sys.exit(console.run(main))
    from megatron_hyperrouter.terminal import run_tool

    run_tool(main)


def _show(text: str) -> NoReturn:
    """Print ``text``; a reader that has closed the pipe is no error."""
    from megatron_hyperrouter import console

    def write() -> None:
        with contextlib.suppress(OSError):
            sys.stdout.write(text)

    sys.exit(console.run(write))


def overview() -> str:
    """All commands in groups, one line each."""
    lines = ["usage: mhr COMMAND [arguments]       (mhr COMMAND --help explains the command)", ""]
    for group, commands in GROUPS.items():
        lines += [f"{group}:", *(f"  {name:<16} {command.summary}" for name, command in commands.items()), ""]
    return "\n".join([*lines, "k: number of experts that process each token (active experts)", ""])


def _unknown(word: str) -> ConfigError:
    near: Sequence[str] = difflib.get_close_matches(word, _COMMANDS, n=1, cutoff=0.7)
    remedy = f"did you mean mhr {near[0]}?" if near else "run mhr --help, which lists all commands"
    return ConfigError([Problem(f"mhr {word}", "", "unknown command", remedy)])
