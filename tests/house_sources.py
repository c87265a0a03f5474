"""What the house tests examine: the files of the repository, their imports and their functions."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "megatron_hyperrouter"
NESTED = ("engines", "data", "commands")  # rooms that hold rooms


@dataclass(frozen=True)
class Import:
    """One import statement of a file."""

    module: str
    line: int
    for_types: bool  # under ``if TYPE_CHECKING``
    at_top: bool  # executed when the file is imported


@dataclass(frozen=True)
class Source:
    """A Python file of the repository."""

    path: Path

    @cached_property
    def name(self) -> str:
        """The path from the repository's root."""
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def module(self) -> str:
        """``megatron_hyperrouter.ops.topk``."""
        return self.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def room(self) -> str:
        """The room of a file of the package: ``ops``, ``engines/deepspeed``; "" for the package's own
        ``__init__``.
        """
        return room_of(self.module)

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        return (
            node for node in ast.walk(self.tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        )

    def imports(self) -> Iterator[Import]:
        yield from imports_of(self.tree.body, for_types=False, at_top=True)


def imports_of(body: list[ast.stmt], *, for_types: bool, at_top: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, for_types, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            # "from package import module" imports the module; a name that is none stays with its file
            yield from (
                Import(f"{node.module}.{alias.name}", node.lineno, for_types, at_top) for alias in node.names
            )
        else:
            inside = at_top and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            typed = for_types or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
            for field in ("body", "orelse", "handlers", "finalbody"):
                yield from imports_of(getattr(node, field, []), for_types=typed, at_top=inside)


def room_of(module: str) -> str:
    """The room of a dotted name of ours, which may go on with a class or a function."""
    parts = module.split(".")[1:]
    if not parts or parts[0].startswith("_"):
        return ""
    if parts[0] in NESTED and len(parts) > 1:
        inner = ROOT / PACKAGE / parts[0] / parts[1]
        if inner.is_dir() or (parts[0], parts[1]) == ("engines", "base"):
            return f"{parts[0]}/{parts[1]}"
    return parts[0]


@lru_cache(maxsize=1)
def tracked() -> tuple[Path, ...]:
    """All files of the repository: those in git, and new ones that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0:
        names = (ROOT / name for name in listed.stdout.split("\0") if name)
    else:  # an unpacked archive
        names = (
            path
            for path in ROOT.rglob("*")
            if not {".venv", "build", "runs", "__pycache__"} & set(path.relative_to(ROOT).parts)
        )
    return tuple(sorted(path for path in names if path.is_file()))


@lru_cache(maxsize=1)
def sources() -> tuple[Source, ...]:
    return tuple(Source(path) for path in tracked() if path.suffix == ".py")


def package() -> list[Source]:
    return [source for source in sources() if source.name.startswith(f"{PACKAGE}/")]


def programs() -> list[Source]:
    """All but the tests."""
    return [source for source in sources() if not source.name.startswith("tests/")]


def fail_with(rule: str, guilty: list[str]) -> None:
    assert not guilty, f"{rule}:\n  " + "\n  ".join(guilty)


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def in_files(module: str, allowed: set[str]) -> bool:
    """True where the table allows the single file that ``module`` stands in: ``train.hooks``."""
    return any("." in each and f"{module}.".startswith(f"{PACKAGE}.{each}.") for each in allowed)


def standard_library() -> frozenset[str]:
    """Names of the standard library's modules, and the annotations of it that type checkers bring."""
    import sys

    return frozenset(sys.stdlib_module_names) | {"_typeshed", "typing_extensions"}


def public(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, str]]:
    """Public functions and classes of a file, and the public methods of its public classes."""
    for node in tree.body:
        if isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        ) and not node.name.startswith("_"):
            yield node, ""
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    named = isinstance(
                        inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
                    ) and not inner.name.startswith("_")
                    if named and not any(
                        ast.unparse(each).endswith(".setter") for each in inner.decorator_list
                    ):
                        yield inner, f"{node.name}."


def is_mutable(value: ast.expr) -> bool:
    """True for a literal list, dict or set, or a call that makes one."""
    if isinstance(value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)):
        return True
    return (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Name)
        and value.func.id in ("list", "dict", "set", "defaultdict", "deque")
    )


def written_to(tree: ast.Module, names: set[str]) -> bool:
    """True where something in the file changes one of the names: an item of it is set, or a method that
    changes it is called.
    """
    methods = {
        "append",
        "extend",
        "update",
        "add",
        "clear",
        "pop",
        "popitem",
        "setdefault",
        "remove",
        "discard",
        "insert",
        "sort",
        "appendleft",
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            changed = node.value
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in methods
        ):
            changed = node.func.value
        elif isinstance(node, ast.AugAssign):
            changed = node.target
        else:
            continue
        if isinstance(changed, ast.Name) and changed.id in names:
            return True
    return False


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """One line for each cycle that a depth-first walk meets."""
    found: list[str] = []
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            found.append(" -> ".join([*path[path.index(module) :], module]))
            return
        if module in done:
            return
        for target in sorted(graph[module]):
            walk(target, (*path, module))
        done.add(module)

    for module in sorted(graph):
        walk(module, ())
    return found
