"""What all rules share: the type of a rule, and the text of common problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_hyperrouter.config.leaves import flag, value_of
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import Problem

Rule = Callable[[RunConfig, "int | None"], Iterator[Problem]]


def broken(config: RunConfig, name: str, rule: str, remedy: str) -> Problem:
    """The problem of one setting, named by its flag; FLAG in ``remedy`` is replaced by that flag."""
    value = value_of(config, name)
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return Problem(flag(name), shown, rule, remedy.replace("FLAG", flag(name)))


def needs(config: RunConfig, name: str, needed: str) -> Problem:
    """The problem of a setting that works only with ``needed``, a flag or several."""
    return broken(config, name, f"needs {needed}", f"add {needed}, or leave out FLAG")


def indivisible(
    config: RunConfig, name: str, by: str, *, value: int | None = None, divisor: int | None = None
) -> Iterator[Problem]:
    """A problem if setting ``name`` is not a multiple of setting ``by``.  Pass the numbers if they differ
    from the values of the settings.
    """
    value = value_of(config, name) if value is None else value
    divisor = value_of(config, by) if divisor is None else divisor
    if value % divisor:
        rule, remedy = (
            f"must be divisible by {flag(by)} = {divisor}",
            f"use {multiples(value, divisor)}, or change {flag(by)}",
        )
        yield Problem(flag(name), value, rule, remedy)


def multiples(value: int, base: int) -> str:
    """The multiples of ``base`` around ``value``: ``248 or 252``."""
    below = value // base * base
    return f"{below} or {below + base}" if below else str(base)
