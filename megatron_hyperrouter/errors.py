"""The errors a user can meet, each with the exit status of the public contract."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

STOPPED = 6  # exit status of a run that stopped before its end on request, after a checkpoint


class HyperRouterError(Exception):
    """Base of every error that the user can correct: one message, one remedy, one exit status."""

    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(f"{message}\n  remedy: {remedy}" if remedy else message)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the settings: field, value, rule, remedy."""

    field: str  # the flag, as the user writes it: ``--num-experts``
    value: object
    rule: str  # what must hold: "must be divisible by --expert-model-parallel-size = 2"
    remedy: str  # what to do: "use 2, 4 or 8 experts"

    def __str__(self) -> str:
        # a flag without a value
        given = "" if self.value in ("", None) else f" = {self.value}"
        return f"{self.field}{given}: {self.rule}\n    remedy: {self.remedy}"


class BadValue(ValueError):
    """A value that cannot be read: the rule and the remedy of the problem to report."""

    def __init__(self, rule: str, remedy: str) -> None:
        super().__init__(rule)
        self.rule = rule
        self.remedy = remedy


class ConfigError(HyperRouterError):
    """Settings that cannot run; lists every problem at once (exit status 2)."""

    exit_status = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''} in the settings:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


class DataError(HyperRouterError):
    """Unusable data: names the file, the position in it and the remedy (exit status 3)."""

    exit_status = 3


class CheckpointError(HyperRouterError):
    """A checkpoint that cannot be written or read (exit status 4)."""

    exit_status = 4


class HostError(HyperRouterError):
    """A missing library or a wrong version of one, with what to install (exit status 5)."""

    exit_status = 5


def reason_of(error: Exception) -> str:
    """Why a file could not be read, in words for a message, without error numbers or exception text."""
    if isinstance(error, OSError):
        return error.strerror or "it cannot be opened"
    if isinstance(error, UnicodeError):
        return "it is not UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON ({error})"
    if isinstance(error, KeyError) and error.args:
        return f'it has no field "{error.args[0]}"'
    if isinstance(error, (KeyError, TypeError, AttributeError, RecursionError)):
        return "its content has an unexpected structure"
    return str(error) or "its content has an unexpected structure"


def in_words(error: Exception) -> str:
    """The type and the message of an error, on one line of at most 200 characters."""
    text = " ".join(str(error).split())
    whole = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return whole if len(whole) <= 200 else f"{whole[:197]}..."
