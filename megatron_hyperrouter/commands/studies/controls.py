"""What ``mhr compare`` adds by default: a control of matched scale, and comparisons with it.

A router with larger initial logits puts more weight on fewer experts, and does better with few of them for
this reason alone.  The control is a random router that is never trained, with logits of the same scale.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hyperrouter.errors import ConfigError, Problem
from megatron_hyperrouter.files import write_json
from megatron_hyperrouter.studies.runs import read_record
from megatron_hyperrouter.studies.verdicts import Named, parse

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig

CONTROL = "matched_control"
STUDY = "study.json"
_ALIKE = 0.05  # scales that differ by less are matched
_SHOWS = "hyper"  # the router that needs a control: its scale is part of its method


def control_for(configs: Mapping[str, RunConfig]) -> dict[str, Any] | None:
    """Options of the control for the first HyperRouter among these; None if there is none, or if a
    fixed router of its scale is among them.
    """
    scales = {label: scale_of(config) for label, config in configs.items()}
    first = next((each for each in configs.values() if each.router.name == _SHOWS), None)
    wanted = None if first is None else scale_of(first)
    if first is None or wanted is None or CONTROL in configs:
        return None
    for label, config in configs.items():
        scale = scales[label]
        if is_fixed(config) and scale is not None and abs(scale / wanted - 1) < _ALIKE:
            return None
    return {"name": "smoe_dropout", **choice_of(first), "logit_std": wanted}


def choice_of(config: RunConfig) -> dict[str, Any]:
    """The router's options, other than their defaults, that say how it chooses and weights experts by its
    logits.
    """
    from megatron_hyperrouter.routers.choice import ChoosingRouter

    own = {each.name: getattr(config.router.options, each.name) for each in fields(ChoosingRouter.Config)}
    defaults = {each.name: each.default for each in fields(ChoosingRouter.Config)}
    return {
        name: value
        for name, value in own.items()
        if value != defaults[name] and name not in ("logit_std", "lr_mult")
    }


def control_among(configs: Mapping[str, RunConfig]) -> str | None:
    """The label of the router that is the control of the first HyperRouter."""
    first = next((config for config in configs.values() if config.router.name == _SHOWS), None)
    wanted = None if first is None else scale_of(first)
    for label, config in configs.items():
        scale = scale_of(config)
        if wanted and scale and is_fixed(config) and abs(scale / wanted - 1) < _ALIKE:
            return label
    return None


def scale_of(config: RunConfig) -> float | None:
    """The standard deviation that the logits start with."""
    std: float | None = config.router.options.initial_logit_std(config.model.hidden_size)
    return std


def is_fixed(config: RunConfig) -> bool:
    """Whether the router is random and never trained."""
    return config.router.name == "smoe_dropout" or bool(getattr(config.router.options, "freeze", False))


def comparisons_of(
    args: Namespace, configs: Mapping[str, RunConfig], topks: Sequence[int], control: str | None
) -> list[Named]:
    """Those that ``--comparisons`` names; by default each HyperRouter against the control, at the smallest k
    and at the k that training ends on.  Raises ConfigError for labels and k that are not compared.
    """
    if args.comparisons is None:
        ends = dict.fromkeys((min(topks), next(iter(configs.values())).model.moe_router_topk))
        shown = [label for label, config in configs.items() if config.router.name == _SHOWS]
        return [Named(label, control, k) for k in ends if k in topks for label in shown if control]
    try:
        named = parse(args.comparisons)
    except ValueError as error:
        remedy = "write, for example, hyper:topk@1"
        raise ConfigError(
            [Problem("--comparisons", " ".join(args.comparisons), str(error), remedy)]
        ) from error
    problems = [
        Problem(
            "--comparisons", each, f"{word} is not one of the compared routers", f"use {', '.join(configs)}"
        )
        for each in named
        for word in (each.left, each.right)
        if word not in configs
    ]
    problems += [
        Problem("--comparisons", each, "uses a k that is not evaluated", "add that k to --topk-eval")
        for each in named
        if each.topk not in topks
    ]
    if problems:
        raise ConfigError(problems)
    return named


def write_study(output: Path, content: Mapping[str, Any], *, started: bool) -> None:
    """Record the planned comparisons before the runs; ``started``: a run is finished, so they must not
    change.
    """
    path = output / STUDY
    if path.exists() and started:
        before = read_record(path, "comparisons", "jobs")
        if before["comparisons"] != content["comparisons"]:
            rule = (
                "cannot be changed once a run is finished; this study has "
                f"{', '.join(before['comparisons']) or 'no comparisons'}"
            )
            remedy = "give the same comparisons, or another --output folder"
            raise ConfigError([Problem("--comparisons", " ".join(content["comparisons"]), rule, remedy)])
        content = {**content, "jobs": max(content["jobs"], before["jobs"])}
    write_json(path, dict(content))
