"""Checks what a caller of ``build_router`` gives, and reports every problem at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from megatron_hyperrouter.errors import ConfigError, Problem
from megatron_hyperrouter.routers.base import ROUTERS, Router


def router_class(name: str) -> type[Router]:
    """The class registered as ``name``; raises ConfigError with the nearest name."""
    if name not in ROUTERS:
        raise ConfigError([Problem("--router.name", name, "is not a router", _suggest(name, ROUTERS))])
    return ROUTERS[name]


def make_options(
    cls: type[Router],
    options: Mapping[str, Any],
    *,
    hidden_size: int,
    num_experts: int,
    topk: int | Callable[[int], int],
) -> Router.Config:
    """The ``Config`` of ``cls`` with these options, for a model of this size; raises ConfigError."""
    problems = [*_size_problems(hidden_size, num_experts, topk), *_option_problems(cls, options)]
    if problems:
        raise ConfigError(problems)
    config = cls.Config(**options)
    if problems := list(config.problems(hidden_size=hidden_size, num_experts=num_experts)):
        raise ConfigError(problems)
    if isinstance(topk, int) and topk > (most := config.largest_topk(num_experts)):
        rule = (
            f"must be at most {most}, the number of experts in --router.group-topk = {config.group_topk} "
            "groups"
        )
        raise ConfigError(
            [Problem("--moe-router-topk", topk, rule, ("use a smaller k, or increase --router.group-topk"))]
        )
    return config


def _size_problems(hidden_size: int, num_experts: int, topk: int | Callable[[int], int]) -> Iterator[Problem]:
    for flag, value in (("--hidden-size", hidden_size), ("--num-experts", num_experts)):
        if value < 1:
            yield Problem(flag, value, "must be at least 1", "use 1 or more")
    if isinstance(topk, int) and not 1 <= topk <= max(num_experts, 1):
        yield Problem(
            "--moe-router-topk",
            topk,
            f"must be from 1 to --num-experts = {num_experts}",
            "use a smaller k, or increase --num-experts",
        )


def _option_problems(cls: type[Router], options: Mapping[str, Any]) -> Iterator[Problem]:
    kinds = get_type_hints(cls.Config, include_extras=True)
    defaults = {field.name: field.default for field in fields(cls.Config)}
    for name, value in options.items():
        if name not in defaults:
            yield Problem(
                f"--router.{name}",
                value,
                f"is not an option of router {cls.name}",
                _suggest(name, defaults),
            )
            continue
        try:
            TypeAdapter(kinds[name]).validate_python(value, strict=True)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            default = "" if defaults[name] is None else f" (default: {defaults[name]})"
            rule, remedy = reason.replace("Input should", "must"), f"leave it out{default}"
            yield Problem(f"--router.{name}", value, rule, remedy)


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(sorted(known)) or 'none'}"
