"""The meaning of ``--data-path`` and of the entries of ``--data-schedule``, without reading data files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from megatron_hyperrouter.config.reading.yaml_text import load_yaml, parse_yaml
from megatron_hyperrouter.config.tree import DataConfig
from megatron_hyperrouter.paths import expanded

Mix = tuple[int, tuple[str, ...]]  # completed steps at which it begins, words of --data-path

SCHEDULE_REMEDY = (
    "write a list of entries with from_step and data_path; start at step 0 and increase from_step"
)


def prefixes_and_weights(words: Sequence[str]) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """``("a", "b")`` or ``("0.3", "a", "0.7", "b")``.  Raises ValueError with the rule where weights and
    prefixes do not alternate.
    """
    weights = [_number(word) for word in words[0::2]]
    odd = len(words) % 2 == 1
    if words and not odd and all(_number(word) is not None for word in words[1::2]) and weights[0] is None:
        raise ValueError("must have each weight before its prefix, not after it")
    if len(words) < 2 or (weights[0] is None and (odd or not any(weight is not None for weight in weights))):
        return tuple(word.strip() for word in words), None
    numbers = tuple(weight for weight in weights if weight is not None)
    if odd or len(numbers) < len(weights):
        raise ValueError("must be prefixes alone, or pairs of a weight and a prefix")
    if not all(0 < weight < math.inf for weight in numbers):
        raise ValueError("must have finite weights greater than 0")
    return tuple(word.strip() for word in words[1::2]), numbers


def scheduled(data: DataConfig) -> tuple[Mix, ...]:
    """The entries of ``data.data_schedule``, a file or a list in YAML.  Raises ValueError with the rule that
    is broken.
    """
    given = str(data.data_schedule)
    try:
        entries = _listed(given) if is_inline(given) else load_yaml(given)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot be read: {reason}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError("must be a list of mixes")
    fill = str if is_inline(given) else expanded  # the schedule in a run's config.yaml is already expanded
    mixes = tuple(_mix(number, entry, fill) for number, entry in enumerate(entries, start=1))
    steps = [step for step, _ in mixes]
    if steps[0] != 0:
        raise ValueError(f"must begin at step 0, not at step {steps[0]}")
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise ValueError(f"must have increasing from_step values, not {', '.join(map(str, steps))}")
    return mixes


def inline(mixes: Sequence[Mix]) -> str:
    """The list itself, as a run's ``config.yaml`` contains it."""
    return json.dumps([{"from_step": step, "data_path": list(path)} for step, path in mixes])


def _listed(schedule: str) -> Any:
    """The list in JSON or YAML.  JSON comes first: YAML reads its ``\\ud83d\\ude00`` as two characters."""
    try:
        return json.loads(schedule)
    except (ValueError, RecursionError):
        return parse_yaml(schedule)


def is_inline(schedule: str) -> bool:
    """Whether it is the list itself and not a file name; a run's ``config.yaml`` contains the list."""
    return schedule.lstrip().startswith("[")


def _mix(number: int, entry: Any, fill: Callable[[str], str]) -> Mix:
    if not isinstance(entry, dict) or set(entry) != {"from_step", "data_path"}:
        raise ValueError(f"entry {number} must have from_step and data_path and no other key")
    step, words = entry["from_step"], entry["data_path"]
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"entry {number}: from_step must be an integer >= 0, not {step}")
    if (
        not isinstance(words, list)
        or not words
        or not all(isinstance(word, str | int | float) for word in words)
    ):
        raise ValueError(
            f"entry {number}: data_path must be a list of prefixes, or of pairs of a weight and a prefix"
        )
    path = tuple(fill(str(word)) for word in words)
    try:
        prefixes, _ = prefixes_and_weights(path)
    except ValueError as error:
        raise ValueError(f"entry {number}: data_path {error}") from error
    if len(set(prefixes)) < len(prefixes):
        raise ValueError(f"entry {number}: data_path names a file twice")
    return step, path


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
