"""``--dry-run [--world-size N]``: flags of the command itself, which are not settings of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_hyperrouter.errors import ConfigError, Problem


class DryRun(NamedTuple):
    """What a command line asks for: whether it is a dry run, on how many ranks, and its other words."""

    asked: bool
    world_size: int | None
    words: list[str]


def asked_for(argv: Sequence[str]) -> DryRun:
    """Take ``--dry-run`` and ``--world-size N`` out of a command line; raises ConfigError."""
    words, asked, world_size, rest = list(argv), False, None, []
    while words:
        name, equals, value = words.pop(0).partition("=")
        if name.replace("_", "-") == "--dry-run":
            given = value if equals else words.pop(0) if _is_value(words) else "true"
            if given not in ("true", "false"):
                remedy = "write --dry-run alone, and the number of ranks after --world-size"
                raise ConfigError([Problem("--dry-run", given, "takes no value", remedy)])
            asked = given == "true"
        elif name.replace("_", "-") == "--world-size":
            given = value if equals else words.pop(0) if _is_value(words) else ""
            if not given.isdecimal() or int(given) < 1:
                remedy = "give the number of ranks"
                raise ConfigError([Problem("--world-size", given, "must be an integer >= 1", remedy)])
            if _is_value(words):  # it would count as a value of the flag before
                both, remedy = f"{given} {words[0]}", "give the number of ranks"
                raise ConfigError([Problem("--world-size", both, "takes one value", remedy)])
            world_size = int(given)
        else:
            rest.append(name + equals + value)
    if world_size is not None and not asked:
        rule = "works only with --dry-run: the launcher sets the number of ranks of a run"
        raise ConfigError(
            [Problem("--world-size", world_size, rule, "add --dry-run, or leave out --world-size")]
        )
    return DryRun(asked, world_size, rest)


def _is_value(words: list[str]) -> bool:
    """Whether the next word is not a flag."""
    return bool(words) and not words[0].startswith("--")
