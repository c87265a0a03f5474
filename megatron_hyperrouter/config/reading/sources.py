"""Reads raw settings from a command line and from a YAML file; checks syntax only, and collects every
problem.

argparse stops at the first mistake and the contract asks for all of them at once, so the few rules of flags
stand here: ``--name value``, ``--name=value``, several words after one flag, and the last of two equal flags
wins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_hyperrouter.config.leaves import ROUTER_PREFIX
from megatron_hyperrouter.errors import Problem

LAUNCHER_FLAGS = ("--local_rank", "--local-rank")  # put in front of ours by the deepspeed launcher


@dataclass
class CommandLine:
    """Flags as written: flag -> its words; words that follow no flag are problems."""

    flags: dict[str, list[str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def pop(self, name: str) -> list[str] | None:
        """The words of one flag, which then counts as understood; None where it was not given."""
        return self.flags.pop(name, None)


@dataclass
class YamlFile:
    """Settings as written in a file: name -> YAML value; router options carry the prefix ``router.``."""

    path: str
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    readable: bool = True  # False: nothing is known of what the file was meant to say


def read_flags(argv: Sequence[str]) -> CommandLine:
    """Split a command line into flags and their words."""
    line = CommandLine()
    words: list[str] | None = None
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            words = line.flags[name] = [value] if equals else []
        elif word == "-h":
            words = line.flags["--help"] = []
        elif words is None:
            line.problems.append(
                Problem(
                    "command line", word, "stands after no flag", "write --flag value; --help lists all flags"
                )
            )
        else:
            words.append(word)
    for name in LAUNCHER_FLAGS:
        line.pop(name)
    return line


def read_yaml(path: str) -> YamlFile:
    """Read flat settings and the mapping ``router`` from a YAML file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        return _unreadable(path, f"cannot be read ({error.strerror})", "name an existing YAML file")
    except UnicodeDecodeError as error:
        return _unreadable(path, f"is not UTF-8 text (byte {error.start})", "name a YAML file")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        return _unreadable(
            path, f"is not valid YAML{line}: {getattr(error, 'problem', None) or error}", "mend that line"
        )
    except (
        ValueError,
        RecursionError,
    ) as error:  # a 13th month, a number of thousands of digits, nesting without end
        return _unreadable(
            path, f"holds a value that YAML cannot read ({error})", "write plain settings, one a line"
        )
    if document is None:
        return YamlFile(path)
    if not isinstance(document, dict):
        return _unreadable(
            path,
            f"must be a mapping of settings, is a {type(document).__name__}",
            "write lines like num_layers: 4",
        )
    return _flatten(path, document, list(_duplicates(root, path)))


def _flatten(path: str, document: dict[Any, Any], problems: list[Problem]) -> YamlFile:
    values = {str(key): value for key, value in document.items() if key != "router"}
    router = document.get("router", {})
    if isinstance(router, dict):
        options = {f"{ROUTER_PREFIX}{key}": value for key, value in router.items()}
        twice = [key for key in options if key in values]
        problems += [
            Problem(f"{key} in {path}", values[key], "stands twice", "keep the one below router:")
            for key in twice
        ]
        values |= options
    else:
        problems.append(
            Problem(f"router in {path}", router, "must be a mapping", "write router: {name: hyper}")
        )
    return YamlFile(path, values, problems)


def _unreadable(path: str, rule: str, remedy: str) -> YamlFile:
    return YamlFile(path, problems=[Problem("--config", path, rule, remedy)], readable=False)


def _duplicates(root: yaml.Node | None, path: str) -> Iterator[Problem]:
    """Keys that stand twice in one mapping, of which YAML would silently take the last."""
    if not isinstance(root, yaml.MappingNode):
        return
    first_line: dict[str, int] = {}
    for key, value in root.value:
        line = key.start_mark.line + 1
        if key.value in first_line:
            yield Problem(
                f"{key.value} in {path}",
                f"lines {first_line[key.value]} and {line}",
                "stands twice",
                "keep one of them",
            )
        first_line.setdefault(str(key.value), line)
        yield from _duplicates(value, path)


def load_yaml(path: str) -> Any:
    """What a YAML file holds.  OSError where it cannot be read, ValueError where it is no YAML."""
    return parse_yaml(Path(path).read_text(encoding="utf-8"))


def parse_yaml(text: str) -> Any:
    """What YAML text says.  ValueError where it is none."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error
