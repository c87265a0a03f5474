"""Differences between the settings of a checkpoint and those of the run that resumes from it.

Settings that change what the weights compute are refused, because the weights would mean something else.
Changes of the training schedule are reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_hyperrouter.config.by_role import leaves_with
from megatron_hyperrouter.config.cli import dump
from megatron_hyperrouter.config.leaves import ROUTER_PREFIX, Leaf, flag, router_leaves, shown, tree_leaves
from megatron_hyperrouter.config.reading.yaml_text import parse_yaml
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.config.schedules.batch_sizes import BatchSizes
from megatron_hyperrouter.config.tree import OptimizerConfig, RunConfig
from megatron_hyperrouter.train.lr import learning_rate_at

# Shapes, and what orders the samples, are compared as they are in effect, see ``resume``; a path may change.
_FUNCTION = (Role.FUNCTION, Role.TOKENIZER)
_COURSE = (Role.DATA, Role.COURSE, Role.SCHEDULE, Role.NOISE)


@dataclass(frozen=True)
class Change:
    """A setting whose value has changed."""

    leaf: Leaf
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{flag(self.leaf.name)} was {shown(self.before)} and is now {shown(self.now)}"


def changes_of_function(saved: str, config: RunConfig) -> list[str]:
    """Settings that change what the weights compute, in words.  ``saved``: a checkpoint's settings, YAML."""
    return [
        str(change)
        for change in _changes(saved, config)
        if change.leaf.role in _FUNCTION or change.leaf.section == "router"
    ]


def changes_of_course(saved: str, config: RunConfig, *, step: int) -> list[str]:
    """Settings that change how the run continues after ``step`` steps, in words."""
    lines = [str(change) for change in _changes(saved, config) if change.leaf.role in _COURSE]
    before, now = _rate(_flat(saved), step + 1), _rate(_flat(dump(config)), step + 1)
    if lines and before is not None and now is not None and before != now:
        lines.append(f"the learning rate of step {step + 1} is {now:.4g}, not {before:.4g} as planned before")
    return lines


def _changes(saved: str, config: RunConfig) -> Iterator[Change]:
    """Every setting that differs, except for paths. A setting that an older version did not have counts as
    its default.
    """
    before, now = _flat(saved), _flat(dump(config))
    if not before:  # a checkpoint of an older version
        return
    leaves = dict(tree_leaves())
    if before.get("router.name") == config.router.name and config.router.options is not None:
        options_type: type = type(config.router.options)
        leaves |= router_leaves(options_type)
    chosen = _chosen_by_size(config)
    for name, leaf in leaves.items():
        was = before.get(name, list(leaf.default) if isinstance(leaf.default, tuple) else leaf.default)
        was, value = (chosen.get(name) if each is None else each for each in (was, now.get(name)))
        if name in now and not leaf.is_path and was != value:
            yield Change(leaf, was, value)


def _chosen_by_size(config: RunConfig) -> dict[str, Any]:
    """For options that may be left open, by flat name: the value that this implies for a model of this
    size.
    """
    chosen = getattr(config.router.options, "chosen_by_size", None)
    if chosen is None or config.model.num_experts is None:
        return {}
    sizes = {"hidden_size": config.model.hidden_size, "num_experts": config.model.num_experts}
    return {f"{ROUTER_PREFIX}{name}": value for name, value in chosen(**sizes).items()}


def _flat(text: str) -> dict[str, Any]:
    """Settings by flat name, as YAML writes them."""
    found = parse_yaml(text)
    if not isinstance(found, dict):
        return {}
    router = found.pop("router", None)
    options = (
        {f"{ROUTER_PREFIX}{name}": value for name, value in router.items()}
        if isinstance(router, dict)
        else {}
    )
    return {str(name): value for name, value in found.items()} | options


def _rate(settings: Mapping[str, Any], step: int) -> float | None:
    """The learning rate that these settings give a step; None if they are of another version."""
    names = {leaf.name for leaf in leaves_with(*Role) if leaf.section == "optimizer"}
    own = {name: value for name, value in settings.items() if name in names}
    try:
        sizes = BatchSizes(int(settings.get("global_batch_size") or 1), settings.get("rampup_batch_size"))
        end = sizes.progress(int(settings["train_iters"]))
        return learning_rate_at(sizes.progress(step), OptimizerConfig(**own), end)
    except (TypeError, ValueError, KeyError, ArithmeticError):
        return None
