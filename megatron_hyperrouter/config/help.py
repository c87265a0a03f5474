"""The text of ``--help``, made from the tree of settings and from every router's own options."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megatron_hyperrouter.config.leaves import Leaf, flag, router_leaves, sections, tree_leaves
from megatron_hyperrouter.config.tree import RouterChoice

COLUMN = 46
WIDTH = 132
KINDS = {int: "N", float: "X", str: "TEXT"}


def help_text(routers: Mapping[str, Any], *, prog: str) -> str:
    """All flags by section, with meaning, range and default; ``routers``: name -> class with a nested
    ``Config``.
    """
    head = [
        f"usage: {prog} [--config FILE.yaml] [--flag VALUE ...]",
        "",
        *textwrap.wrap(
            "Flags override the YAML file, which overrides the defaults. A YAML key is the flag's name with "
            "underscores; the router's "
            "settings stand in a mapping: router: {name: hyper, hypernet_width: 256}. A --router.name other "
            "than the file's replaces "
            "that whole mapping.",
            WIDTH,
        ),
        "",
        *_row("--config FILE", "YAML file of settings; the config.yaml of a run starts the same run again"),
        *_row("--help, -h", "this text"),
    ]
    for section, config_type in sections().items():
        leaves = (leaf for leaf in tree_leaves().values() if leaf.section == section)
        head += ["", f"{section}: {_summary(config_type)}", *_rows(leaves)]
    head += [
        "",
        "router:",
        *_row(
            f"{flag('router.name')} NAME",
            f"one of {', '.join(sorted(routers))} (default: {RouterChoice().name})",
        ),
    ]
    for name in sorted(routers):
        rows = list(_rows(router_leaves(routers[name].Config).values()))
        head += ["", f"router {name}: {_summary(routers[name])}", *(rows or ["  (no options)"])]
    return "\n".join(head) + "\n"


def _rows(leaves: Iterable[Leaf]) -> Iterator[str]:
    for leaf in leaves:
        notes = "; ".join(filter(None, [_range(leaf), _default(leaf)]))
        yield from _row(_usage(leaf), f"{leaf.help} ({notes})" if notes else leaf.help)


def _row(left: str, text: str) -> Iterator[str]:
    lines = textwrap.wrap(text, WIDTH - COLUMN, break_on_hyphens=False)
    if len(left) + 4 > COLUMN:
        yield f"  {left}"
    else:
        yield f"  {left}".ljust(COLUMN) + lines.pop(0)
    yield from (" " * COLUMN + line for line in lines)


def _usage(leaf: Leaf) -> str:
    if leaf.off_flag:
        return f"{leaf.flag}, {leaf.off_flag}"
    return f"{leaf.flag} {'TEXT [TEXT ...]' if leaf.is_tuple else KINDS.get(leaf.base, 'NAME')}"


def _range(leaf: Leaf) -> str:
    """What a value must be, where its type does not say all of it."""
    return leaf.describe() if leaf.choices or leaf.rules else ""


def _default(leaf: Leaf) -> str:
    if leaf.default in (None, ()):
        return "" if "default:" in leaf.help else "default: none"
    if isinstance(leaf.default, tuple):
        return "default: " + " ".join(map(str, leaf.default))
    return f"default: {str(leaf.default).lower() if leaf.base is bool else leaf.default}"


def _summary(documented: type) -> str:
    """The first line of a docstring."""
    return (documented.__doc__ or "").strip().split("\n")[0]
