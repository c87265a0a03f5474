"""``--data-schedule``: a YAML file that says which files are read from which step on.

- from_step: 0
  data_path: [0.7, web, 0.3, code]
- from_step: 8000
  data_path: [0.2, web, 0.8, books]

The flag also takes such a list itself, which is how ``config.yaml`` of a run keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_hyperrouter.config.schedules.mixes import SCHEDULE_REMEDY, Mix, inline, is_inline, scheduled
from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.data.order.blend import parse_blend
from megatron_hyperrouter.data.stream.stores import MOCK
from megatron_hyperrouter.errors import ConfigError, Problem


def mixes_of(data: DataConfig, *, step: int = 0) -> tuple[Mix, ...]:
    """What is read from which step on: by the schedule, or one mix for the whole run.

    ConfigError for something that is not a schedule, or that names a missing file; files that are not read
    after ``step`` steps may be gone.
    """
    if data.mock_data:
        return ((0, (MOCK,)),)
    if data.data_schedule is None:
        return ((0, data.data_path or data.train_data_path),)
    try:
        mixes = scheduled(data)
    except ValueError as error:
        raise _refused(data, str(error)) from error
    steps = [step for step, _ in mixes]
    for number, (path, until) in enumerate(
        zip((path for _, path in mixes), [*steps[1:], None], strict=True), start=1
    ):
        if until is None or until > step:
            _check_files(data, number, path)
    return mixes


def settled(data: DataConfig, mixes: Sequence[Mix]) -> DataConfig:
    """The settings with the content of the schedule in place of the file's name, so that the file is no
    longer needed. Without ``data_path`` and ``train_data_path``, the first mix becomes ``train_data_path`` if
    validation or test have separate files, else ``data_path``, which ``--split`` divides.
    """
    if data.data_schedule is None:
        return data
    data = replace(data, data_schedule=inline(mixes))
    if data.data_path or data.train_data_path:
        return data
    own = data.valid_data_path or data.test_data_path
    return replace(data, train_data_path=mixes[0][1]) if own else replace(data, data_path=mixes[0][1])


def _check_files(data: DataConfig, number: int, path: tuple[str, ...]) -> None:
    for prefix in parse_blend(path, flag="--data-schedule").prefixes:
        if missing := [end for end in (".bin", ".idx") if not Path(prefix + end).is_file()]:
            raise _refused(data, f"entry {number}: the file {prefix}{missing[0]} does not exist")


def _refused(data: DataConfig, rule: str) -> ConfigError:
    given = str(data.data_schedule)
    shown = f"{given[:60]} ..." if len(given) > 60 and is_inline(given) else given
    return ConfigError([Problem("--data-schedule", shown, rule, SCHEDULE_REMEDY)])
