"""Reads raw settings from a command line and from a YAML file: checks syntax only, collects every problem.

argparse stops at the first mistake and the contract asks for all of them at once, so the few rules of flags
are here: ``--name value``, ``--name=value``, several words after one flag, underscores count as dashes, and
the last of two equal flags wins, except for flags that each name one more thing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_hyperrouter.config.leaves import ROUTER_PREFIX, tree_leaves
from megatron_hyperrouter.config.reading.yaml_text import compose, duplicates, text_of, value_of_node
from megatron_hyperrouter.errors import BadValue, Problem
from megatron_hyperrouter.paths import expanded

LAUNCHER_FLAGS = ("--local-rank",)  # put in front of ours by the deepspeed launcher
REPEATED_FLAGS = ("--alarm", "--skip-steps", "--sample-prompt")  # their words add up


@dataclass
class CommandLine:
    """Flags as written: flag -> its words; words that follow no flag are problems."""

    flags: dict[str, list[str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    earlier: list[tuple[str, list[str]]] = field(default_factory=list)  # words that a later flag replaced

    def notes(self) -> list[str]:
        """For the user: flags that were given again with other words."""
        return [
            f"{name} is given more than once; the last value is used: {' '.join(self.flags[name])}"
            for name in dict.fromkeys(
                name for name, words in self.earlier if self.flags.get(name, words) != words
            )
        ]

    def pop(self, name: str) -> list[str] | None:
        """The words of one flag, which then counts as understood; None if it was not given."""
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
    if any(word.endswith("\r") for word in argv):
        remedy = "convert the script that starts this command, for example with dos2unix"
        line.problems.append(Problem("command line", "", "has the line ends of Windows", remedy))
        argv = [word.rstrip("\r") for word in argv if word != "\r"]
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            spelling, equals, value = word.partition("=")
            name = spelling.replace("_", "-")
            before = line.flags.get(name, []) if name in REPEATED_FLAGS else []
            if name in line.flags and not before:
                line.earlier.append((name, line.flags[name]))
            words = line.flags[name] = [*before, value] if equals else before
        elif word == "-h":
            words = line.flags["--help"] = []
        elif words is None:
            remedy = "write values after a flag: --flag VALUE"
            line.problems.append(Problem("command line", word, "is not the value of a flag", remedy))
        else:
            words.append(word)
    for name in LAUNCHER_FLAGS:
        line.pop(name)
    json_file = line.pop("--deepspeed")  # DeepSpeed's own spelling: a switch, or transformers' file
    if json_file and line.flags.setdefault("--deepspeed-config", json_file) != json_file:
        rule, remedy = "names another file than --deepspeed-config", "keep one of the two flags"
        line.problems.append(Problem("--deepspeed", " ".join(json_file), rule, remedy))
    return line


def read_given_yaml(word: str) -> YamlFile:
    """Read the file that ``--config`` names, in which ``~`` and ``$VARIABLE`` are expanded."""
    try:
        return read_yaml(expanded(word))
    except BadValue as bad:
        return _unreadable(word, bad.rule, bad.remedy)


def read_yaml(path: str) -> YamlFile:
    """Read flat settings and the mapping ``router`` from a YAML file."""
    try:
        text = text_of(path)
    except OSError as error:
        return _unreadable(path, f"cannot be read ({error.strerror})", "give an existing YAML file")
    except UnicodeDecodeError as error:
        return _unreadable(path, f"is not UTF-8 text (byte {error.start})", "give a YAML file")
    except ValueError as error:  # a NUL in the name
        return _unreadable(repr(path), f"is not a file name ({error})", "give an existing YAML file")
    try:
        root = compose(text)
        document = value_of_node(root)
    except ValueError as error:
        return _unreadable(path, str(error), "write one setting on each line, such as num_layers: 4")
    if document is None:
        return YamlFile(path)
    if not isinstance(document, dict):
        kind = "list" if isinstance(document, list) else "single value"
        return _unreadable(
            path,
            f"must be a mapping of settings, not a {kind}",
            "write one setting on each line, such as num_layers: 4",
        )
    twice = [_twice(path, name, f"lines {first} and {line}") for name, first, line in duplicates(root)]
    return _flatten(path, document, twice)


def _flatten(path: str, document: dict[str, Any], problems: list[Problem]) -> YamlFile:
    """The settings of a document; a section around some of them is reported, and they are read."""
    file = YamlFile(path, {}, problems)
    for key, value in document.items():
        name = _name(key)
        if name == "router" and isinstance(value, dict):
            _add(
                file,
                ((ROUTER_PREFIX + _name(option), each) for option, each in value.items()),
                "below router:",
            )
        elif name == "router":
            remedy = "write router: {name: hyper}"
            problems.append(
                Problem(f"router in {path}", value, "must be a mapping of router options", remedy)
            )
        elif isinstance(value, dict) and name not in tree_leaves():
            example = next(iter(value), "num_layers")
            rule = "groups settings in a section, which is not supported"
            remedy = f"remove {key}: and write its settings without indentation ({example}: ...)"
            problems.append(Problem(f"{key} in {path}", "", rule, remedy))
            _add(file, ((_name(inner), each) for inner, each in value.items()), "outside the section")
        else:
            _add(file, ((name, value),), "")
    return file


def _add(file: YamlFile, settings: Iterable[tuple[str, Any]], where: str) -> None:
    for name, value in settings:
        if name in file.values:
            remedy = f"keep the entry {where}" if where else "keep one of the two entries"
            file.problems.append(_twice(file.path, name, file.values[name], remedy))
        file.values[name] = value


def _name(key: str) -> str:
    """A flag's spelling is accepted: ``hypernet-width`` for ``hypernet_width``."""
    return key.removeprefix("--").replace("-", "_")


def _twice(path: str, name: str, value: object, remedy: str = "keep one of the two entries") -> Problem:
    return Problem(f"{name} in {path}", value, "appears twice", remedy)


def _unreadable(path: str, rule: str, remedy: str) -> YamlFile:
    return YamlFile(path, problems=[Problem("--config", path, rule, remedy)], readable=False)
