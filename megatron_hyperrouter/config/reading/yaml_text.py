"""YAML as this program reads it: plain values (the core schema of YAML 1.2), no tags, bounded size.

PyYAML follows YAML 1.1, in which ``010`` is 8, ``1:30`` is 90, ``no`` is false and ``2001-01-01`` is a
date.  Here values are read literally, and the type of the setting decides.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

MOST_VALUES = 100_000  # with aliases written out: 400 bytes of them can stand for 10**9 values
MOST_BYTES = 1 << 24  # of a file of settings: a device such as /dev/zero has no end
PLAIN = "tag:yaml.org,2002:"
_EXPONENT = "[eE][-+]?[0-9]+"
_NOT_FINITE = r"[-+]?\.inf|\.nan"
CORE: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("null", re.compile(r"|~|null|Null|NULL")),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE")),
    ("int", re.compile(r"[-+]?(0|[1-9][0-9]*)")),
    (
        "float",
        re.compile(rf"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)({_EXPONENT})?|[-+]?[0-9]+{_EXPONENT}|{_NOT_FINITE}"),
    ),
)


class _Loader(yaml.SafeLoader):
    """Plain words carry no type yet: see :func:`_scalar`."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, Any]]] = {}  # noqa: RUF012 - the library's own name


def load_yaml(path: str) -> Any:
    """What a YAML file contains.  OSError if it cannot be read; ValueError if it is not YAML, or has a key
    twice.
    """
    root = compose(text_of(path))
    found = value_of_node(root)
    for name, first, line in duplicates(root):
        places = f"in line {line}" if first == line else f"in lines {first} and {line}"
        raise ValueError(f"has the key {name} twice, {places}")
    return found


def why_not(error: OSError | ValueError) -> str:
    """What is wrong with a file for which :func:`load_yaml` raised this."""
    about_content = isinstance(error, ValueError) and not isinstance(error, UnicodeDecodeError)
    return str(error) if about_content else f"cannot be read: {getattr(error, 'strerror', None) or error}"


def text_of(path: str) -> str:
    """The UTF-8 text of a file of settings.  OSError if it cannot be read or is too large.

    A command reads its settings more than once, but a pipe, as in ``--config <(...)``, can be read only once.
    """
    return _read(path) if Path(path).is_file() else _read_once(path)


@lru_cache(maxsize=16)
def _read_once(path: str) -> str:
    return _read(path)


def _read(path: str) -> str:
    with Path(path).open("rb") as stream:
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MOST_BYTES >> 20} MB")
    return content.decode("utf-8-sig")  # editors on Windows put a byte-order mark first


def parse_yaml(text: str) -> Any:
    """The value of YAML text. Raises ValueError with the reason."""
    return value_of_node(compose(text))


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML text from which :func:`parse_yaml` makes equal values."""
    # not allow_unicode: PyYAML then loses the character U+0085
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, width=100)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that :func:`_scalar` would take for something else."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = not any(pattern.fullmatch(text) for _, pattern in CORE)
    return dumper.represent_scalar(f"{PLAIN}str", text, style=None if plain else "'")


_Dumper.add_representer(str, _text)


def compose(text: str) -> yaml.Node | None:
    """The syntax tree of one YAML document; None for an empty one.  Raises ValueError with the reason."""
    try:
        root: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        said = (getattr(error, name, None) for name in ("context", "problem"))
        why = ", ".join(filter(None, said)) or error  # "expected ..., but found ..."
        raise ValueError(f"is not valid YAML{line}: {why}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is nested too deeply, or is not text: {error}") from error
    return root


def value_of_node(root: yaml.Node | None) -> Any:
    """Dictionaries, lists and plain values.  Raises ValueError with the line and the reason."""
    return None if root is None else _Reader().read(root)


def duplicates(root: yaml.Node | None) -> Iterator[tuple[str, int, int]]:
    """Keys that occur twice in one mapping, with both lines: YAML would silently use the last one."""
    if isinstance(root, yaml.SequenceNode):
        for each in root.value:
            yield from duplicates(each)
    if not isinstance(root, yaml.MappingNode):
        return
    first_line: dict[str, int] = {}
    for key, value in root.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in first_line:
            yield name, first_line[name], line
        first_line.setdefault(name, line)
        yield from duplicates(value)


class _Reader:
    """One walk over a syntax tree."""

    def __init__(self) -> None:
        self._values = 0
        self._open: set[int] = set()  # nodes around the present one

    def read(self, node: yaml.Node) -> Any:
        self._values += 1
        if self._values > MOST_VALUES:
            raise ValueError(
                f"contains more than {MOST_VALUES} values, because aliases (*name) repeat each other"
            )
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if id(node) in self._open:
            raise ValueError(f"has a value that contains itself (*name), in line {node.start_mark.line + 1}")
        if node.tag not in (f"{PLAIN}seq", f"{PLAIN}map"):
            raise ValueError(f"has an unsupported tag in line {node.start_mark.line + 1}: {node.tag}")
        self._open.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            value: Any = [self.read(item) for item in node.value]
        else:
            value = {self._key(key): self.read(item) for key, item in node.value}
        self._open.remove(id(node))
        return value

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise ValueError(f"has a key in line {node.start_mark.line + 1} that is not a plain name")
        return str(node.value)


def _short(tag: str) -> str:
    """A tag as the user writes it: ``!!int``."""
    return f"!!{tag.removeprefix(PLAIN)}" if tag.startswith(PLAIN) else tag


def _scalar(node: yaml.ScalarNode) -> Any:
    text, line = str(node.value), node.start_mark.line + 1
    if "\0" in text or (not text.isascii() and text != text.encode("utf-8", "replace").decode()):
        raise ValueError(f"has an invalid character in line {line}")
    kind = node.tag.removeprefix(PLAIN)
    if kind == "str" and node.style is None:  # a plain word without a tag
        kind = next((name for name, pattern in CORE if pattern.fullmatch(text)), "str")
    elif kind != "str" and not any(name == kind and pattern.fullmatch(text) for name, pattern in CORE):
        raise ValueError(
            f"has the value {text} in line {line}, which does not fit its tag {_short(node.tag)}"
        )
    try:
        return _CONVERTERS[kind](text)
    except ValueError as error:  # thousands of digits
        raise ValueError(f"has an unreadable number in line {line}: {error}") from error


_CONVERTERS: Mapping[str, Any] = {
    "str": str,
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan")),
}
