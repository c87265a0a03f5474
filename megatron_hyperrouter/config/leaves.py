"""Walks the tree of settings: one :class:`Leaf` a setting, from which flags, YAML keys, validation and
``--help`` are made.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from megatron_hyperrouter.config.roles import IsPath, Metavar, Only, Quiet, Role
from megatron_hyperrouter.config.tree import RunConfig

T = TypeVar("T")

ROUTER_PREFIX = "router."
WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
PLURALS = {int: "integers", float: "numbers", str: "words"}
SIGNS = {Ge: ("ge", ">="), Gt: ("gt", ">"), Le: ("le", "<="), Lt: ("lt", "<")}


@dataclass(frozen=True)
class Leaf:
    """One setting: its section and name in the tree, its allowed values, and its meaning."""

    section: str  # field of RunConfig: "model"; "router" for a router's own option
    name: str  # "num_experts"; with the prefix "router." for a router's own option
    base: Any  # int, float, bool, str, Literal[...] or tuple[X, ...]; never None
    rules: tuple[object, ...]  # annotated_types on one value
    optional: bool  # None is allowed
    default: Any
    help: str
    role: Role = Role.FUNCTION  # what it changes
    only: Only | None = None  # the one engine that has it
    quiet: Any = None  # the value with which it does nothing
    is_path: bool = False  # ``~`` and ``$VARIABLE`` in it are expanded
    metavar: str = ""  # for --help; empty: made from the type

    @property
    def flag(self) -> str:
        """The flag as a user writes it: ``--num-experts``."""
        return flag(self.name)

    @property
    def off_flag(self) -> str | None:
        """The flag that switches a bool off: ``--no-bf16``, ``--router.no-bias``; None for other types."""
        option = self.name.removeprefix(ROUTER_PREFIX)
        if self.base is not bool or option.startswith("no_"):
            return None
        return flag(f"{self.name[: -len(option)]}no_{option}")

    @property
    def kind(self) -> Any:
        """The annotation that pydantic validates, without None."""
        parts = (self.base, *self.rules)
        return Annotated[parts] if self.rules else self.base

    @property
    def is_tuple(self) -> bool:
        """True if one flag takes several words."""
        return get_origin(self.base) is tuple

    @property
    def item(self) -> Any:
        """The type of one word where a flag takes several; the type of the value elsewhere."""
        return _unwrap(get_args(self.base)[0])[0] if self.is_tuple else self.base

    @property
    def length(self) -> int | None:
        """How many words the flag takes; None for any number of them, and for a single value."""
        parts = get_args(self.base)
        return len(parts) if self.is_tuple and Ellipsis not in parts else None

    @property
    def choices(self) -> tuple[object, ...]:
        """The allowed values of a ``Literal``; empty otherwise."""
        return get_args(self.base) if get_origin(self.base) is Literal else ()

    def describe(self) -> str:
        """What a value must be, in words: ``an integer >= 1 or none``."""
        if self.choices:
            text = "one of " + ", ".join(map(str, self.choices))
        elif self.is_tuple:
            many = "one or more" if self.length is None else self.length
            text = f"{many} {PLURALS.get(self.item, 'values')}"
        else:
            text = " ".join(filter(None, [WORDS.get(self.base, str(self.base)), self.bounds()]))
        return f"{text}, or none" if self.optional else text

    def bounds(self) -> str:
        """The range in words: ``>= 0 and <= 2``; empty if any value goes."""
        signs = (
            (sign, getattr(rule, name))
            for rule in self.rules
            for kind, (name, sign) in SIGNS.items()
            if isinstance(rule, kind)
        )
        return " and ".join(
            f"{sign} {bound:g}" if isinstance(bound, float) else f"{sign} {bound}" for sign, bound in signs
        )


def flag(name: str) -> str:
    """``num_experts`` -> ``--num-experts``; ``router.hypernet_width`` -> ``--router.hypernet-width``."""
    return "--" + name.replace("_", "-")


def shown(value: Any) -> str:
    """A setting's value as YAML and flags write it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@lru_cache(maxsize=1)
def sections() -> Mapping[str, type]:
    """Name and dataclass of each section of the tree, in order, without the router."""
    kinds = get_type_hints(RunConfig)
    return types.MappingProxyType({f.name: kinds[f.name] for f in fields(RunConfig) if f.name != "router"})


@lru_cache(maxsize=1)
def tree_leaves() -> Mapping[str, Leaf]:
    """Every setting but the router's, by name."""
    found: dict[str, Leaf] = {}
    for section, config_type in sections().items():
        for leaf in _leaves_of(config_type, section, ""):
            if other := found.get(leaf.name):
                raise TypeError(f"setting {leaf.name!r} is in two sections: {other.section} and {section}")
            found[leaf.name] = leaf
    return types.MappingProxyType(found)


@lru_cache(maxsize=64)
def router_leaves(config_type: type) -> Mapping[str, Leaf]:
    """A router's own options, by prefixed name: ``router.hypernet_width``."""
    found = {leaf.name: leaf for leaf in _leaves_of(config_type, "router", ROUTER_PREFIX)}
    if f"{ROUTER_PREFIX}name" in found:
        raise TypeError(
            f"{config_type.__qualname__}.name: an option must not be called name, because "
            "--router.name chooses the router"
        )
    return types.MappingProxyType(found)


def value_of(config: RunConfig, name: str) -> Any:
    """The value of one setting by its flat name."""
    if name == "router.name":
        return config.router.name
    if name.startswith(ROUTER_PREFIX):
        return getattr(config.router.options, name.removeprefix(ROUTER_PREFIX))
    return getattr(getattr(config, tree_leaves()[name].section), name)


def _leaves_of(config_type: type, section: str, prefix: str) -> Iterator[Leaf]:
    hints = get_type_hints(config_type, include_extras=True)
    for entry in fields(config_type):
        base, metadata, optional = _unwrap(hints[entry.name])
        where = f"{config_type.__qualname__}.{entry.name}"
        texts = [item for item in metadata if isinstance(item, str)]
        if not texts:
            raise TypeError(f"{where} needs a help text: Annotated[type, rules..., role, 'help'] = default")
        role = _only(Role, metadata, where) or (Role.FUNCTION if prefix else None)
        if role is None:
            raise TypeError(f"{where} needs a role: Annotated[type, rules..., role, 'help'] = default")
        default, quiet = _default(entry, where), _only(Quiet, metadata, where)
        path, shown = _only(IsPath, metadata, where), _only(Metavar, metadata, where)
        yield Leaf(
            section=section,
            name=prefix + entry.name,
            base=base,
            rules=tuple(
                item
                for item in metadata
                if not isinstance(item, str | Role | Only | Quiet | IsPath | Metavar)
            ),
            optional=optional,
            default=default,
            help=texts[-1],
            role=role,
            only=_only(Only, metadata, where),
            quiet=quiet.value if quiet else default,
            is_path=path is not None,
            metavar=shown.words if shown else path.metavar if path else "",
        )


def _only(kind: type[T], metadata: Iterable[object], where: str) -> T | None:
    """The one item of this kind; None if there is none."""
    found = [item for item in metadata if isinstance(item, kind)]
    if len(found) > 1:
        raise TypeError(f"{where} has {len(found)} annotations of type {kind.__name__}; keep one")
    return found[0] if found else None


def _default(entry: Field[Any], where: str) -> Any:
    if entry.default is not MISSING:
        return entry.default
    if entry.default_factory is not MISSING:
        return entry.default_factory()
    raise TypeError(f"{where} needs a default: every setting can be left out")


def _unwrap(hint: Any) -> tuple[Any, tuple[object, ...], bool]:
    """Take ``Annotated`` and ``| None`` off a hint: (type, metadata from inside out, None allowed)."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *metadata = get_args(hint)
        base, rules, optional = _unwrap(inner)
        return base, (*rules, *metadata), optional
    if origin in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        if len(members) != 1 or len(get_args(hint)) != 2:
            raise TypeError(f"the type of a setting must be X or X | None, not {hint}")
        base, rules, _ = _unwrap(members[0])
        return base, rules, True
    return hint, (), False
