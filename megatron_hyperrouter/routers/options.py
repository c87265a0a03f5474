"""Checks what a caller of ``build_router`` gives, and reports every problem at once."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from numbers import Real
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_hyperrouter.errors import ConfigError, Problem
from megatron_hyperrouter.ops.topk import whole
from megatron_hyperrouter.routers.base import ROUTERS, Router, RunFacts

_FINITE = ConfigDict(allow_inf_nan=False)


def router_class(name: str) -> type[Router]:
    """The class registered as ``name``; raises ConfigError with the nearest name."""
    if not isinstance(name, str) or name not in ROUTERS:
        raise ConfigError(
            [Problem("--router.name", str(name), "is not a router", _suggest(str(name), ROUTERS))]
        )
    return ROUTERS[name]


def make_options(
    cls: type[Router],
    options: Mapping[str, Any],
    *,
    hidden_size: int,
    num_experts: int,
    topk: int | Callable[[int], int],
    others: Mapping[str, Any],
) -> Router.Config:
    """The ``Config`` of ``cls`` with these options, for a model of this size.  ``others``: the other
    keywords of the constructor, which are only checked.  Raises ConfigError.
    """
    problems = [
        *_size_problems(hidden_size, num_experts, topk),
        *_common_problems(**others),
        *_option_problems(cls, options),
    ]
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
        if not _is_integer(value):
            yield Problem(flag, repr(value), "must be an integer", "use an integer of at least 1")
        elif value < 1:
            yield Problem(flag, value, "must be at least 1", "use 1 or more")
    if callable(topk) or not _is_integer(num_experts):
        return
    if not _is_integer(topk):
        rule = "must be an integer, or a function that returns an integer for a step"
        yield Problem(
            "--moe-router-topk", repr(topk), rule, f"use an integer from 1 to {max(num_experts, 1)}"
        )
    elif not 1 <= topk <= max(num_experts, 1):
        yield Problem(
            "--moe-router-topk",
            topk,
            f"must be from 1 to --num-experts = {num_experts}",
            "use a smaller k, or increase --num-experts",
        )


def _common_problems(
    *, layer_number: int, seed: int, aux_loss_coeff: float, z_loss_coeff: float, facts: RunFacts | None
) -> Iterator[Problem]:
    """Problems of the arguments that have the same meaning for every router."""
    for name, number, least in (("layer_number", layer_number, 1), ("seed", seed, 0)):
        if not _is_integer(number) or not least <= number < 1 << 63:
            rule = f"must be an integer from {least} to 2^63 - 1"
            yield Problem(name, repr(number), rule, f"use an integer from {least} to 2^63 - 1")
    for name, weight in (("aux_loss_coeff", aux_loss_coeff), ("z_loss_coeff", z_loss_coeff)):
        if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= weight < math.inf:
            rule = "must be a finite number >= 0"
            yield Problem(name, repr(weight), rule, "use 0 to leave this loss out")
    if facts is None:
        return
    if not isinstance(facts, RunFacts):
        remedy = "use RunFacts(num_layers=..., train_iters=..., vocab_size=...)"
        yield Problem("facts", repr(facts), "must be a RunFacts, or None", remedy)
        return
    for name in ("num_layers", "train_iters", "vocab_size"):
        value = getattr(facts, name)
        if not _is_integer(value) or value < 1:
            yield Problem(f"facts.{name}", repr(value), "must be an integer >= 1", "use 1 or more")


def _is_integer(value: object) -> bool:
    with contextlib.suppress(ValueError):
        whole(value)
        return True
    return False


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
            TypeAdapter(kinds[name], config=_FINITE).validate_python(value, strict=True)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            default = "" if defaults[name] is None else f" (default: {defaults[name]})"
            rule, remedy = reason.replace("Input should", "must"), f"leave it out{default}"
            yield Problem(f"--router.{name}", value, rule, remedy)


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(sorted(known)) or 'none'}"
