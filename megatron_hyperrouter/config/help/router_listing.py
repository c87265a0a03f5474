"""The routers' options for ``--help``, read from their source files, because importing them would import
torch.

A router is one file: its class says ``class Mine(Router, name="mine")``, and its nested ``Config`` lists
the options. Annotations are evaluated only with the names in ``VOCABULARY`` and the file's own aliases.
"""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import annotated_types

from megatron_hyperrouter.config import kinds, roles

FOLDER = Path(__file__).resolve().parents[2] / "routers"
VOCABULARY: Mapping[str, Any] = MappingProxyType(
    {**vars(typing), **vars(annotated_types), **vars(kinds), **vars(roles)}
)


def listed_routers(folder: Path = FOLDER) -> dict[str, Any]:
    """Router name -> an object with the docstring and the ``Config`` of that router's class.

    Raises ValueError, naming the file, if an option cannot be understood without importing the file.
    """
    classes = {cls.name: cls for path in sorted(folder.glob("*.py")) for cls in _classes_of(path)}
    listed = {}
    for cls in classes.values():
        if cls.router is not None:
            config = dataclasses.make_dataclass("Config", _options(cls, classes), frozen=True, kw_only=True)
            listed[cls.router] = SimpleNamespace(__doc__=ast.get_docstring(cls.node), Config=config)
    return listed


@dataclasses.dataclass(frozen=True)
class _Class:
    """A top-level class of a file, and the names that its annotations may use."""

    path: Path
    node: ast.ClassDef
    aliases: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def router(self) -> str | None:
        """The name under which it is registered."""
        given = [word.value for word in self.node.keywords if word.arg == "name"]
        return ast.literal_eval(given[0]) if given else None


def _classes_of(path: Path) -> Iterator[_Class]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    aliases: dict[str, Any] = {}
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Annotated["):
            aliases |= {ast.unparse(target): _value(node.value, {}, path) for target in node.targets}
    yield from (_Class(path, node, aliases) for node in body if isinstance(node, ast.ClassDef))


def _options(cls: _Class, classes: Mapping[str, _Class]) -> list[tuple[str, Any, Any]]:
    """The fields of ``Config``, inherited ones first: (name, type, default)."""
    found: dict[str, tuple[str, Any, Any]] = {}
    for base in map(ast.unparse, cls.node.bases):
        if base in classes:
            found |= {option[0]: option for option in _options(classes[base], classes)}
    for inner in cls.node.body:
        if isinstance(inner, ast.ClassDef) and inner.name == "Config":
            for line in inner.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value:
                    kind = _value(line.annotation, cls.aliases, cls.path)
                    default = _value(line.value, cls.aliases, cls.path)
                    found[line.target.id] = (line.target.id, kind, dataclasses.field(default=default))
    return list(found.values())


def _value(node: ast.expr, aliases: Mapping[str, Any], path: Path) -> Any:
    code = compile(ast.Expression(node), str(path), "eval")
    try:
        return eval(code, {"__builtins__": {}, **BUILTINS, **VOCABULARY, **aliases})
    except (NameError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {ast.unparse(node)} cannot be read without importing the file") from error


BUILTINS: Mapping[str, Any] = MappingProxyType(
    {kind.__name__: kind for kind in (int, float, str, bool, tuple)}
)
