"""Writes the help text to the terminal."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_hyperrouter.config.help.router_listing import listed_routers
from megatron_hyperrouter.config.help.text import help_text
from megatron_hyperrouter.config.reading.sources import read_flags


def show_help_first(argv: Sequence[str], *, prog: str) -> bool:
    """Show what ``--help`` asks for, without loading torch; False if nothing asks for it.

    Raises ConfigError if the words after it are not a section.
    """
    flags = read_flags(argv).flags
    if "--help" not in flags:
        return False
    try:
        routers = listed_routers()
    except ValueError:  # an unusual router: its file has to be imported
        return False
    show_help(routers, prog=prog, topic=flags["--help"])
    return True


def show_help(routers: Mapping[str, Any], *, prog: str, topic: Sequence[str]) -> None:
    """The help text at the terminal's width, on one rank."""
    if os.environ.get("RANK", "0") == "0":
        width = shutil.get_terminal_size().columns
        text = help_text(routers, prog=prog, topic=topic, width=width)
        with contextlib.suppress(OSError):  # the reader has closed the pipe, as in "mhr train --help | head"
            sys.stdout.write(text)
