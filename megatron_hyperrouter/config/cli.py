"""Builds the settings of a run: defaults < YAML < flags, checked, with every problem in one error.

``routers`` is always the registry, passed as an argument: name -> class with a nested frozen dataclass
``Config``.  It is an argument because this room does not import torch, and because a new router adds its
own flags.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_hyperrouter.config.draft import Draft
from megatron_hyperrouter.config.help.show import show_help
from megatron_hyperrouter.config.leaves import (
    ROUTER_PREFIX,
    Leaf,
    flag,
    router_leaves,
    sections,
    tree_leaves,
    value_of,
)
from megatron_hyperrouter.config.reading.sources import YamlFile, read_flags, read_given_yaml, read_yaml
from megatron_hyperrouter.config.reading.values import convert
from megatron_hyperrouter.config.reading.yaml_text import dump_yaml
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.errors import BadValue, ConfigError, Problem


def parse(
    argv: Sequence[str],
    *,
    routers: Mapping[str, Any],
    world_size: int | None = None,
    prog: str = "pretrain_gpt_hyperrouter.py",
    notes: list[str] | None = None,
) -> RunConfig:
    """The settings of a command line, merged over those of its ``--config`` file.

    ``world_size``: number of ranks, see :func:`launched_world_size`; None if unknown, which skips the
    rules that need it. ``notes`` receives notes for the user about how the settings were understood.
    ``--help`` prints and raises SystemExit(0).  Raises ConfigError with every problem at once.
    """
    line = read_flags(argv)
    if "--help" in line.flags:
        show_help(routers, prog=prog, topic=line.flags["--help"])
        raise SystemExit(0)
    repeated = line.notes()
    words = line.pop("--config")
    if words is None:
        file = YamlFile("")
    elif not "".join(words).strip():
        file = YamlFile("", readable=False)
        line.problems.append(Problem("--config", "", "needs a file name", "write --config FILE.yaml"))
    else:
        file = read_given_yaml(" ".join(words))
    draft = Draft(routers, file, flags=line.flags, problems=line.problems)
    config = draft.finish(world_size=world_size)
    if notes is not None:
        notes += [*repeated, *draft.notes()]
    return config


def load_file(
    path: str | Path,
    *,
    routers: Mapping[str, Any],
    overrides: Mapping[str, object] | None = None,
    world_size: int | None = None,
) -> RunConfig:
    """The settings of a YAML file such as a run's ``config.yaml``; ``overrides`` by flat name
    (``num_workers``, ``router.seed``).
    """
    return Draft(routers, read_yaml(str(path)), overrides=overrides).finish(world_size=world_size)


def launched_world_size(environ: Mapping[str, str] | None = None) -> int:
    """Ranks that the launcher started: WORLD_SIZE, as deepspeed and torchrun set it; 1 without a launcher."""
    return int((os.environ if environ is None else environ).get("WORLD_SIZE", "1"))


def dump(config: RunConfig) -> str:
    """The settings as YAML text, from which ``parse(["--config", file])`` makes an equal RunConfig."""
    parts = []
    for section in sections():
        values = {
            leaf.name: _to_write(leaf, value_of(config, leaf.name))
            for leaf in tree_leaves().values()
            if leaf.section == section
        }
        parts.append(_yaml(section, values))
    options = _option_leaves(config)
    router = {name.removeprefix(ROUTER_PREFIX): value_of(config, name) for name in options}
    parts.append(_yaml("router", {"router": {"name": config.router.name, **router}}))
    return "\n".join(parts)


def _to_write(leaf: Leaf, value: Any) -> Any:
    """The value, with the dollar signs of paths doubled, because reading expands variables."""
    if not leaf.is_path or value is None:
        return value
    return tuple(word.replace("$", "$$") for word in value) if leaf.is_tuple else value.replace("$", "$$")


def replace_leaves(config: RunConfig, **leaves: object) -> RunConfig:
    """A copy with other values, by flat name: ``replace_leaves(config, num_layers=2, **{"router.seed": 7})``.

    Checks each value on its own (ConfigError), but not the rules that join several settings; see
    ``check.problems``.
    """
    known = {**tree_leaves(), **_option_leaves(config)}
    changes: dict[str, dict[str, object]] = {}
    problems = []
    for name, value in leaves.items():
        if name not in known:
            raise KeyError(f"{name} is not a setting; use a flat name such as num_layers or router.seed")
        try:
            changes.setdefault(known[name].section, {})[name.removeprefix(ROUTER_PREFIX)] = convert(
                known[name], value
            )
        except BadValue as bad:
            problems.append(Problem(flag(name), value, bad.rule, bad.remedy))
    if problems:
        raise ConfigError(problems)
    if own := changes.pop("router", None):
        config = replace(config, router=replace(config.router, options=replace(config.router.options, **own)))
    return replace(
        config,
        **{section: replace(getattr(config, section), **values) for section, values in changes.items()},
    )


def _option_leaves(config: RunConfig) -> Mapping[str, Leaf]:
    options_type: type = type(config.router.options)
    return {} if config.router.options is None else router_leaves(options_type)


def _yaml(title: str, values: Mapping[str, object]) -> str:
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return f"# {title}\n{dump_yaml(plain)}"
