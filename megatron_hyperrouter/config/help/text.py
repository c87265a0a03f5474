"""The text of ``--help``, made from the tree of settings and from every router's own options."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megatron_hyperrouter.config.leaves import Leaf, flag, router_leaves, sections, tree_leaves
from megatron_hyperrouter.config.reading.values import nearest
from megatron_hyperrouter.config.tree import RouterChoice
from megatron_hyperrouter.errors import ConfigError, Problem

NARROWEST, WIDEST = 60, 120  # columns; longer lines are hard to read
TWO_COLUMNS = 100  # from this width on, the help text is to the right of the flag
COLUMN = 46
FEW = 3  # options that two routers share are explained for each of them
KINDS = {int: "N", float: "X", str: "TEXT"}
EXAMPLES = (
    "{prog} --config examples/quickstart.yaml --lr 1e-3",
    "{prog} --config run.yaml --router.name hyper --router.hypernet-width 64",
    "deepspeed pretrain_gpt_hyperrouter.py --config examples/cluster.yaml",
)


def help_text(routers: Mapping[str, Any], *, prog: str, topic: Sequence[str] = (), width: int = 80) -> str:
    """The settings by section, with meaning, range and default, for a terminal of ``width`` columns.

    ``routers``: name -> class with a nested ``Config``.  ``topic``: words after ``--help``.

    Raises ConfigError if there is no such section.
    """
    page = _Page(min(max(width, NARROWEST), WIDEST) - 1)
    wanted = _wanted(topic, routers)
    lines = [] if topic else list(_head(page, prog, routers))
    for section, config_type in sections().items():
        if section in wanted:
            found = (leaf for leaf in tree_leaves().values() if leaf.section == section)
            lines += ["", *page.title(section, config_type), *page.rows(found)]
    if "router" in wanted:
        names = f"One of {', '.join(sorted(routers))} (default: {RouterChoice().name})"
        title = "router: The router, and the options that every router has"
        lines += ["", title, *page.row(f"{flag('router.name')} NAME", names)]
        lines += _all_routers(page, routers)
    for name in sorted(routers):
        if f"router {name}" in wanted:
            rows = list(page.rows(router_leaves(routers[name].Config).values()))
            lines += ["", *page.title(f"router {name}", routers[name]), *(rows or ["  (no options)"])]
    if not topic:
        lines += ["", *page.wrapped(f"{prog} --help SECTION shows one section: {_names()}.")]
    return "\n".join(lines).lstrip("\n") + "\n"


def _all_routers(page: _Page, routers: Mapping[str, Any]) -> Iterator[str]:
    """The options of every router; a group of options that several routers have is explained once."""
    options = {name: tuple(router_leaves(routers[name].Config).values()) for name in sorted(routers)}
    explained: dict[Leaf, str] = {}  # to the title under which it is explained
    if len(options) > 1:
        shared = set.intersection(*map(set, options.values()))
        explained |= {leaf: "router" for leaf in next(iter(options.values())) if leaf in shared}
        yield from page.rows(explained)
    for name, leaves in options.items():
        title = f"router {name}"
        groups: dict[str, list[Leaf]] = {}  # title -> options that are explained there
        for leaf in leaves:
            groups.setdefault(explained.get(leaf, title), []).append(leaf)
        named = {other: group for other, group in groups.items() if other != title and len(group) > FEW}
        named.setdefault("router", groups.get("router", []))
        elsewhere = {leaf for group in named.values() for leaf in group}
        yield from ("", *page.title(title, routers[name]))
        yield from page.rows(leaf for leaf in leaves if leaf not in elsewhere)
        for other, group in named.items():
            if other != "router":
                flags = ", ".join(leaf.flag for leaf in group)
                yield from page.wrapped(f"Also these options of {other}: {flags}", indent=2)
        if not leaves:
            yield "  (no options)"
        explained = dict.fromkeys(leaves, title) | explained


def _wanted(topic: Sequence[str], routers: Mapping[str, Any]) -> set[str]:
    """The titles of the sections to show."""
    all_routers = {f"router {name}" for name in routers}
    everything = {*sections(), "router", *all_routers}
    asked = " ".join(topic).removeprefix("--").replace(".", " ")
    if not topic:
        return {*sections(), "router"}
    if asked in everything:
        return {asked}
    remedy = "choose one of " + ", ".join([*sections(), "router", "router NAME"])
    if close := nearest(asked, everything):
        remedy = f"did you mean --help {close}?"
    raise ConfigError([Problem("--help", asked, "is not a section of the help", remedy)])


def _names() -> str:
    return ", ".join([*sections(), "router", "or router NAME"])


def _head(page: _Page, prog: str, routers: Mapping[str, Any]) -> Iterator[str]:
    yield f"usage: {prog} [--config FILE.yaml] [--flag VALUE ...]"
    yield from ("", "examples:")
    for line in EXAMPLES:
        yield from page.wrapped(line.format(prog=prog), indent=2)
    yield ""
    yield from page.wrapped(
        "Flags override the YAML file, which overrides the defaults. A YAML key is the flag's name "
        "with underscores; the router's settings form a mapping: router: {name: hyper, "
        "hypernet_width: 256}. If --router.name differs from the name in the file, the router "
        "settings in the file are ignored. In a path, on the command line or in the file, ~ and "
        "$VARIABLE are expanded as in a shell; write $$ for a dollar sign."
    )
    yield ""
    yield from page.wrapped(f"Show one section with --help SECTION: {_names()}.")
    yield ""
    yield from page.row(
        "--config FILE.yaml",
        "YAML file with settings; the config.yaml in a run folder repeats that run",
    )
    yield from page.row(
        "--dry-run [--world-size N]",
        "Check the settings and show layout, parameters, memory, tokens and epochs, without training",
    )
    yield from page.row("--help, -h [SECTION]", "Show this text, or one section of it")


class _Page:
    """Lines of one width."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.column = COLUMN if width + 1 >= TWO_COLUMNS else 8

    def wrapped(self, text: str, *, indent: int = 0) -> Iterator[str]:
        prefix = " " * indent
        # A line never ends between a comparison and its number, as in ">= 1".
        whole = re.sub(r"([<>]=?) (?=[0-9])", "\\1\N{NO-BREAK SPACE}", text)
        for line in textwrap.wrap(
            whole, self.width, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False
        ):
            yield line.replace("\N{NO-BREAK SPACE}", " ")

    def title(self, name: str, documented: object) -> Iterator[str]:
        """``model: The transformer ...``: the first line of a docstring."""
        summary = " ".join((documented.__doc__ or "").strip().split("\n\n")[0].split()).replace("``", "")
        yield from self.wrapped(f"{name}: {summary}")

    def rows(self, leaves: Iterable[Leaf]) -> Iterator[str]:
        for leaf in leaves:
            meaning, _, default = leaf.help.partition("; default: ")
            shown = f"default: {default}" if default else _default(leaf)
            usage, choices = _usage(leaf), ""
            if leaf.choices and len(usage) + 2 > self.width:  # it would break inside a name
                usage, choices = f"{leaf.flag} NAME", "one of " + ", ".join(map(str, leaf.choices))
            notes = "; ".join(filter(None, [_engine(leaf), choices, leaf.bounds(), shown]))
            yield from self.row(usage, f"{meaning} ({notes})" if notes else meaning)

    def row(self, left: str, text: str) -> Iterator[str]:
        lines = list(self.wrapped(text, indent=self.column))
        if len(left) + 4 <= self.column and lines:
            lines[0] = f"  {left}".ljust(self.column) + lines[0].lstrip()
        else:
            yield from self.wrapped(left, indent=2)
        yield from lines


def _usage(leaf: Leaf) -> str:
    if leaf.off_flag:
        return f"{leaf.flag}, {leaf.off_flag}"
    if leaf.base is bool:
        return leaf.flag
    if leaf.choices:
        return f"{leaf.flag} {{{','.join(map(str, leaf.choices))}}}"
    word = leaf.metavar or KINDS.get(leaf.item, "VALUE")
    if leaf.metavar and leaf.length is not None:
        return f"{leaf.flag} {leaf.metavar}"
    if leaf.length is not None:
        return " ".join([leaf.flag, *[word] * leaf.length])
    return f"{leaf.flag} {word} [{word} ...]" if leaf.is_tuple else f"{leaf.flag} {word}"


def _engine(leaf: Leaf) -> str:
    return f"{leaf.only.engine} engine" if leaf.only else ""


def _default(leaf: Leaf) -> str:
    if leaf.default in (None, ()):
        return "default: none"
    if isinstance(leaf.default, tuple):
        return "default: " + " ".join(map(str, leaf.default))
    return f"default: {str(leaf.default).lower() if leaf.base is bool else leaf.default}"
