"""The command-line parser of all tools: its errors look like those of the settings of a run."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from megatron_hyperrouter.errors import BadValue, ConfigError, Problem
from megatron_hyperrouter.paths import expanded, why_closed

_KINDS = {"int": "an integer", "float": "a finite number", "size": "a size such as 500MB or 5GB"}
_LIKENESS = 0.7
_WIDEST = 108  # columns; longer lines are hard to read
# A line of a list in a description: "  runs.csv   one row per run".
_ROW = re.compile(r"(?P<head> +\S.{0,24}? {2,})(?P<text>\S.*)")
# what --help calls a value that is a path, or a list of them
PATHS = re.compile(r"FILE(\.\w+)?|DIR|FOLDER|P|RUN|RUN_DIR|RUN_OR_(FOLDER|STUDY)|tokenizer\.json")
# what --help calls a value that is a folder which the command looks into
_FOLDERS = re.compile(r"DIR|FOLDER|RUN|RUN_DIR|RUN_OR_(FOLDER|STUDY)")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps a description at the terminal's width: its paragraphs, and the second column of its lists.

    Other indented lines, which are commands, stay as they are.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Called by argparse for the description and the epilog."""
        blocks: list[tuple[str, str]] = []  # what precedes the text in its first line; the text
        for line in text.splitlines():
            start = len(line) - len(line.lstrip())
            if row := _ROW.fullmatch(line):
                blocks.append((row["head"], row["text"]))
            elif blocks and line.strip() and blocks[-1][1] and start == len(blocks[-1][0]):
                blocks[-1] = (blocks[-1][0], f"{blocks[-1][1]} {line.strip()}")
            else:
                blocks.append(("", line) if start == 0 else (line, ""))
        return "\n".join(
            textwrap.fill(
                " ".join(words.split()),
                min(width, _WIDEST),
                initial_indent=head,
                subsequent_indent=" " * len(head),
                break_on_hyphens=False,
                break_long_words=False,
            )
            or head
            for head, words in blocks
        )


class Parser(argparse.ArgumentParser):
    """Refuses what it cannot read with a :class:`ConfigError`."""

    checks_folders = True  # refuses a folder that this user may not look into

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As argparse; no flag of type float takes nan or inf."""
        super().__init__(*args, **kwargs)
        self.register("type", float, _finite)

    def _parse_optional(self, arg_string: str) -> Any:
        """Called by argparse for each word; underscores in a flag's name count as dashes, as in mhr train."""
        return super()._parse_optional(self._with_dashes(arg_string))

    def _with_dashes(self, word: str) -> str:
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        is_spelling = name.startswith("--") and name not in self._flags() and dashed in self._flags()
        return f"{dashed}{equals}{value}" if is_spelling else word

    def _flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Called by argparse for each value.  Paths are expanded here, because a shell leaves ``~`` in
        ``--load=~/run`` as it is, and no shell reads the values in a YAML file.
        """
        kind = action.metavar if isinstance(action.metavar, str) else ""
        if action.type is Path or PATHS.fullmatch(kind):
            name = "/".join(action.option_strings) or kind
            try:
                arg_string = expanded(arg_string)
            except BadValue as bad:
                shown = arg_string if arg_string.strip() else repr(arg_string)
                self.refuse(name, shown, bad.rule, bad.remedy)
            if self.checks_folders and _FOLDERS.fullmatch(kind) and (why := why_closed(arg_string)):
                self.refuse(
                    name,
                    arg_string,
                    f"cannot be used ({why})",
                    "give another folder, or make this folder readable",
                )
        return super()._get_value(action, arg_string)

    def error(self, message: str) -> NoReturn:
        """Called by argparse with its message; raises ConfigError with a message in this program's style."""
        for pattern, make in _MEANINGS:
            if found := re.fullmatch(pattern, message, re.DOTALL):
                raise ConfigError([make(self, found)])
        raise ConfigError([Problem("command line", "", message, self._lists_flags())])

    def refuse(self, flag: str, value: object, rule: str, remedy: str) -> NoReturn:
        """Raise ConfigError with one problem: ``--seeds`` = 0: must be at least 1."""
        if isinstance(value, (list, tuple)):
            value = " ".join(map(str, value))
        raise ConfigError([Problem(flag, value, rule, remedy)])

    def check_at_least(self, args: argparse.Namespace, least: int, *names: str) -> None:
        """Refuse a flag, by its name in ``args``, that has a smaller value; None counts as not given."""
        for name in names:
            value = getattr(args, name)
            if value is not None and not min(value if isinstance(value, list) else [value]) >= least:
                flag = f"--{name.replace('_', '-')}"
                self.refuse(flag, value, f"must be at least {least}", f"use {flag} {least} or more")

    def _lists_flags(self) -> str:
        return f"run {self.prog} --help, which lists all flags"

    def _missing(self, found: re.Match[str]) -> Problem:
        *firsts, last = found[1].split(", ")
        names = f"{', '.join(firsts)} and {last}" if firsts else last
        return Problem(
            names, "", "must be given", f"add {names}; run {self.prog} --help, which explains all flags"
        )

    def _unknown(self, found: re.Match[str]) -> Problem:
        word = found[1].split()[0] if found[1].strip() else repr(found[1])  # "$UNSET" in a script
        near = difflib.get_close_matches(word.partition("=")[0], self._flags(), n=1, cutoff=_LIKENESS)
        if not word.startswith("-"):
            return Problem("command line", word, "does not belong to a flag", self._lists_flags())
        return Problem(word, "", "unknown flag", f"did you mean {near[0]}?" if near else self._lists_flags())


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _flag(found: re.Match[str]) -> str:
    return found["flag"].split("/")[-1]


def _choice(parser: Parser, found: re.Match[str]) -> Problem:
    choices = found["choices"].replace("'", "")
    return Problem(_flag(found), found["value"], f"must be one of {choices}", "use one of these values")


def _value(parser: Parser, found: re.Match[str]) -> Problem:
    kind = _KINDS.get(found["kind"], f"a {found['kind']}")
    return Problem(_flag(found), found["value"], f"must be {kind}", f"give {kind}")


def _argument(rest: str) -> str:
    return rf"argument (?P<flag>\S+): {rest}"


def _no_value(parser: Parser, found: re.Match[str]) -> Problem:
    return Problem(_flag(found), "", "needs a value", f"write a value after {_flag(found)}")


def _extra_value(parser: Parser, found: re.Match[str]) -> Problem:
    return Problem(_flag(found), found["value"], "takes no value", f"write {_flag(found)} alone")


def _both(parser: Parser, found: re.Match[str]) -> Problem:
    return Problem(_flag(found), "", f"cannot be combined with {found['other']}", "keep one of the two")


def _one_of(parser: Parser, found: re.Match[str]) -> Problem:
    names = found[1].replace(" ", " or ")
    return Problem("command line", "", f"{names} is required", f"add {names}")


_MEANINGS: tuple[tuple[str, Callable[[Parser, re.Match[str]], Problem]], ...] = (
    ("the following arguments are required: (.+)", Parser._missing),
    ("unrecognized arguments: (.*)", Parser._unknown),
    (_argument(r"invalid choice: '?(?P<value>.*?)'? \(choose from (?P<choices>.*)\)"), _choice),
    (_argument(r"invalid (?P<kind>\w+) value: '(?P<value>.*)'"), _value),
    (_argument(r"expected (?:one|at least one|\d+) arguments?"), _no_value),
    (_argument(r"ignored explicit argument '(?P<value>.*)'"), _extra_value),
    (_argument(r"not allowed with argument (?P<other>\S+)"), _both),
    ("one of the arguments (.+) is required", _one_of),
)
