"""Lists of settings, made from the roles of the leaves; none is maintained by hand."""

from __future__ import annotations

from typing import Any

from megatron_hyperrouter.config.leaves import Leaf, tree_leaves, value_of
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.config.tree import RunConfig

# What a run that continues from a checkpoint does about a setting that has changed since:
MODEL = (Role.SHAPE, Role.FUNCTION, Role.TOKENIZER)  # it refuses
COURSE = (Role.DATA, Role.ORDER, Role.BATCH, Role.COURSE, Role.SCHEDULE, Role.NOISE)  # it reports
SPREAD = (Role.ENGINE, Role.LAYOUT, Role.SHARDING, Role.PRECISION)  # it moves the state
FREE = (Role.INITIAL, Role.SPEED, Role.PORTION, Role.UPKEEP, Role.START, Role.PLACE, Role.DISPLAY)  # nothing


def leaves_with(*roles: Role) -> tuple[Leaf, ...]:
    """The settings with one of these roles, in the order of the tree."""
    return tuple(leaf for leaf in tree_leaves().values() if leaf.role in roles)


def names_with(*roles: Role) -> tuple[str, ...]:
    """The names of the settings with one of these roles."""
    return tuple(leaf.name for leaf in leaves_with(*roles))


def values_with(config: RunConfig, *roles: Role) -> dict[str, Any]:
    """Name -> value of the settings with one of these roles."""
    return {name: value_of(config, name) for name in names_with(*roles)}


def beyond_plain_layers(config: RunConfig) -> list[str]:
    """Flags of the settings that create layers other than grouped-query attention and a mixture of experts,
    for code that does not support such layers.
    """
    names = ("moe_layer_freq", "moe_shared_expert_intermediate_size", "mtp_num_layers")
    return [
        leaf.flag
        for leaf in tree_leaves().values()
        if (leaf.section == "attention" or leaf.name in names) and value_of(config, leaf.name) != leaf.default
    ]


def quiet(*roles: Role) -> dict[str, Any]:
    """Name -> the value with which each setting of these roles does nothing: overrides that leave it out."""
    return {leaf.name: leaf.quiet for leaf in leaves_with(*roles)}


def quiet_on(engine: str) -> dict[str, Any]:
    """Overrides that switch off settings that ``engine`` does not have, except settings that change the
    model.
    """
    return {
        leaf.name: leaf.quiet
        for leaf in tree_leaves().values()
        if leaf.only is not None and leaf.only.engine != engine and leaf.role not in MODEL
    }
