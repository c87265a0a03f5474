"""``--data-schedule``: a YAML file that says which files are read from which step on.

- from_step: 0
  data_path: [0.7, web, 0.3, code]
- from_step: 8000
  data_path: [0.2, web, 0.8, books]

The flag also takes such a list itself, which is how ``config.yaml`` of a run keeps it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_hyperrouter.config.sources import load_yaml, parse_yaml
from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.blend import parse_blend
from megatron_hyperrouter.errors import ConfigError, Problem

Mix = tuple[int, tuple[str, ...]]  # completed steps from which on, words of --data-path
_REMEDY = "write a list of entries with from_step and data_path, the first from step 0, steps rising"


def mixes_of(data: DataConfig, *, step: int = 0) -> tuple[Mix, ...]:
    """What is read from which step on: by the schedule, or one mix for the whole run.

    ConfigError for a schedule that is none, or that names a file which is not there; what is over after ``step`` steps may be gone.
    """
    if data.data_schedule is None:
        return ((0, data.data_path or data.train_data_path),)
    try:
        entries = parse_yaml(data.data_schedule) if _is_inline(data.data_schedule) else load_yaml(data.data_schedule)
    except (OSError, ValueError) as error:
        raise _refused(data, f"cannot be read: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise _refused(data, "is no list of mixes")
    mixes = tuple(_mix(data, number, entry) for number, entry in enumerate(entries, start=1))
    steps = [step for step, _ in mixes]
    if steps[0] != 0:
        raise _refused(data, f"begins at step {steps[0]}, not 0")
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise _refused(data, f"has steps that do not rise: {', '.join(map(str, steps))}")
    for number, (path, until) in enumerate(zip((path for _, path in mixes), [*steps[1:], None], strict=True), start=1):
        if until is None or until > step:
            _check_files(data, number, path)
    return mixes


def settled(data: DataConfig, mixes: Sequence[Mix]) -> DataConfig:
    """The settings without need of the schedule's file: its content in place of its name, and its first mix as what is divided by
    ``--split``, or as what is trained on where validation or test have files of their own, unless the settings name that themselves."""
    if data.data_schedule is None:
        return data
    data = replace(data, data_schedule=json.dumps([{"from_step": step, "data_path": list(path)} for step, path in mixes]))
    if data.data_path or data.train_data_path:
        return data
    own = data.valid_data_path or data.test_data_path
    return replace(data, train_data_path=mixes[0][1]) if own else replace(data, data_path=mixes[0][1])


def _mix(data: DataConfig, number: int, entry: Any) -> Mix:
    if not isinstance(entry, dict) or set(entry) != {"from_step", "data_path"}:
        raise _refused(data, f"entry {number} must have from_step and data_path, and nothing else")
    step, words = entry["from_step"], entry["data_path"]
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise _refused(data, f"entry {number}: from_step must be a whole number from 0, got {step!r}")
    if not isinstance(words, list) or not words or not all(isinstance(word, str | int | float) for word in words):
        raise _refused(data, f"entry {number}: data_path must be a list of prefixes, each optionally after its weight")
    path = tuple(str(word) for word in words)
    prefixes = parse_blend(path, flag=f"--data-schedule, entry {number}").prefixes
    if len(set(prefixes)) < len(prefixes):
        raise _refused(data, f"entry {number} names a file twice")
    return step, path


def _check_files(data: DataConfig, number: int, path: tuple[str, ...]) -> None:
    for prefix in parse_blend(path, flag="--data-schedule").prefixes:
        if missing := [end for end in (".bin", ".idx") if not Path(prefix + end).is_file()]:
            raise _refused(data, f"entry {number}: {prefix}{missing[0]} is not there")


def _is_inline(schedule: str) -> bool:
    return schedule.lstrip().startswith("[")


def _refused(data: DataConfig, rule: str) -> ConfigError:
    given = str(data.data_schedule)
    return ConfigError([Problem("--data-schedule", f"{given[:60]} ..." if len(given) > 60 and _is_inline(given) else given, rule, _REMEDY)])
