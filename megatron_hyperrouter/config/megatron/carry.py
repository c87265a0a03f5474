"""Translates a command of Megatron-LM: each flag is translated, ignored and counted, or refused."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from megatron_hyperrouter.config.leaves import flag, tree_leaves
from megatron_hyperrouter.config.megatron.absent import FEATURES
from megatron_hyperrouter.config.megatron.defaults import defaults_that_differ
from megatron_hyperrouter.config.megatron.no_effect import NO_EFFECT
from megatron_hyperrouter.config.megatron.table import (
    ABSENT,
    ALWAYS,
    ARITHMETIC,
    CONTRADICTIONS,
    RENAMED,
    Absent,
)
from megatron_hyperrouter.config.megatron.translate import EARLY, SETS, in_order, worked_out
from megatron_hyperrouter.errors import BadValue, Problem

ALL_ABSENT: Mapping[str, Absent] = MappingProxyType(
    {
        name: Absent(f"is for {feature}", without)
        for (feature, without), names in FEATURES.items()
        for name in names.split()
    }
    | dict(ABSENT)
)


class Pending(NamedTuple):
    """A flag to convert when all settings are known."""

    place: str
    words: list[str]
    by_flag: bool  # given on the command line, not in a file


REFINES = ("ckpt-step",)  # they refine a setting that may be given as well
DATA_FILES = ("data-args-path", "per-split-data-args-path")


@dataclass
class Carried:
    """How the flags of Megatron-LM were treated."""

    always: list[str] = field(default_factory=list)
    no_effect: list[str] = field(default_factory=list)
    translated: list[str] = field(default_factory=list)  # "--save is --run-dir"
    pending: dict[str, Pending] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)  # names of all flags and keys, with dashes
    origin: dict[str, str] = field(default_factory=dict)  # our flag or key -> the flag of Megatron-LM
    problems: list[Problem] = field(default_factory=list)
    unsure: set[str] = field(default_factory=set)  # settings of ours whose intended value is not known

    def notes(self) -> Iterator[str]:
        """One line that counts them."""
        parts = []
        if self.always:
            parts.append(
                f"{_count(self.always)} {_have(self.always)} the only value that this program supports"
            )
        if self.no_effect:
            parts.append(f"{_count(self.no_effect)} {_have(self.no_effect)} no effect on the result")
        if self.translated:
            parts.append("translated: " + ", ".join(self.translated))
        if parts:
            yield "Megatron-LM flags in this command: " + "; ".join(parts)
        foreign = len(self.always) + len(self.no_effect) + len(self.translated)
        yield from defaults_that_differ(self.given, foreign)


def _have(flags: list[str]) -> str:
    return "has" if len(flags) == 1 else "have"


def _count(flags: list[str]) -> str:
    return f"{len(flags)} ({', '.join(flags)})" if len(flags) <= 3 else str(len(flags))


@dataclass(frozen=True)
class Source:
    """Settings as one source gives them: the flags of a command line, or the keys of a file."""

    given: dict[str, Any]
    key: Callable[[str], str]  # name of a setting -> its key: ``--num-layers`` or ``num_layers``
    place: Callable[[str], str]  # key -> how a message names it
    words: Callable[[Any], list[str] | None]  # value of a key -> words; None if it is switched off
    beneath: Mapping[str, Any] = field(default_factory=dict)  # settings of ours from a weaker source


def carry_over(source: Source, ours: Container[str], carried: Carried) -> None:
    """Translate flags of Megatron-LM that this program does not have."""
    for key in list(source.given):
        name = key.removeprefix("--").replace("_", "-")
        carried.given.add(name)
        if key.removeprefix("--").replace("-", "_") in ours or not is_known(name):
            continue
        raw = source.given.pop(key)
        _carry(name, source.place(key), source.words(raw), source, carried)


def contradictions(carried: Carried, values: Mapping[str, Any]) -> Iterator[Problem]:
    """Pairs of flags that cannot both be meant; ``values``: of our settings."""
    for one, other in CONTRADICTIONS:
        setting = other.replace("-", "_")
        if one in carried.given and other in carried.given and values[setting]:
            yield Problem(flag(one), "", f"contradicts {flag(other)}", "keep one of the two flags")


def work_out(
    carried: Carried, values: dict[str, Any], written: Mapping[str, bool], world_size: int | None
) -> list[Problem]:
    """Convert settings in other units, and put the results into ``values``.

    ``written``: settings that the user gives -> whether a flag gives it; flags override the file.
    """
    problems = []
    given = {ours: (flag(ours), by_flag) for ours, by_flag in written.items()}
    for name, (place, words, by_flag) in in_order(carried.pending):
        if not by_flag and written.get(SETS[name]) and name not in REFINES:
            continue  # a flag overrides this key of the file
        try:
            ours, value = worked_out(name, words, values, world_size)
            other, stronger = given.get(ours, (place, False)) if name not in REFINES else (place, False)
            if other != place and stronger == by_flag:
                raise BadValue(f"sets the same thing as {other}", "keep one of the two flags")
        except BadValue as bad:
            problems.append(Problem(place, " ".join(words), bad.rule, bad.remedy))
            continue
        if stronger and not by_flag:
            continue
        given[ours] = (place, by_flag)
        values[ours] = value
        shown = "not needed" if value is None else f"{flag(ours)} {value}"
        carried.translated.append(f"{place} {' '.join(words)} is {shown}")
    return problems


def settled(values: dict[str, Any], written: Container[str]) -> Iterator[str]:
    """Switch on or off what the other settings determine, as Megatron-LM does, and report it."""
    tensor_parallel = values["tensor_model_parallel_size"] > 1
    if values["sequence_parallel"] and not tensor_parallel:
        values["sequence_parallel"] = False
        yield "--sequence-parallel is off, because it needs --tensor-model-parallel-size greater than 1"
    if values["engine"] == "megatron" and tensor_parallel and "sequence_parallel" not in written:
        values["sequence_parallel"] = True
        yield "--sequence-parallel is on, because megatron-core needs it for experts with tensor parallelism"
    if values["use_rope_scaling"] and values["multi_latent_attention"]:
        values["use_rope_scaling"] = False
        values["rope_scaling_factor"] = tree_leaves()["rope_scaling_factor"].default
        yield "--use-rope-scaling is off, because latent attention uses --rope-type yarn instead"


def words_of(raw: object) -> list[str] | None:
    """A YAML value as the words of a flag; None if it switches the flag off."""
    if raw is None or raw is False:
        return None
    if raw is True:
        return []
    return [str(word) for word in raw] if isinstance(raw, list) else [str(raw)]


def is_known(name: str) -> bool:
    """Whether the table has this flag, written with dashes."""
    return any(name in part for part in (ALWAYS, NO_EFFECT, RENAMED, ARITHMETIC, ALL_ABSENT))


def _carry(name: str, place: str, words: list[str] | None, source: Source, carried: Carried) -> None:
    if words is None:
        if name in ALWAYS:
            carried.problems.append(
                Problem(place, "false", f"cannot be switched off: {ALWAYS[name].fact}", "leave it out")
            )
    elif name in ALWAYS:
        _check_always(name, place, words, carried)
    elif name in NO_EFFECT:
        carried.no_effect.append(flag(name))
    elif name in RENAMED:
        _put(name, place, {RENAMED[name]: words}, source, carried)
    elif name in EARLY:
        try:
            _put(name, place, EARLY[name](words, lambda other: _read(source, other)), source, carried)
        except BadValue as bad:
            carried.problems.append(Problem(place, " ".join(words), bad.rule, bad.remedy))
            carried.unsure |= {"data_path"} if name in DATA_FILES else set()
    elif name in ARITHMETIC:
        carried.pending.setdefault(name, Pending(place, words, place.startswith("--")))
    else:
        row = ALL_ABSENT[name]
        instead = row.without.startswith("use ")
        remedy = row.without if instead else f"leave it out; then {row.without}"
        carried.problems.append(Problem(place, " ".join(words), f"is not supported; it {row.does}", remedy))


def _check_always(name: str, place: str, words: list[str], carried: Carried) -> None:
    row = ALWAYS[name]
    if [word for word in words if word not in row.accepted and word.lower() != "true"]:
        remedy = f"use {' or '.join(row.accepted)}" if row.accepted else "write the flag without a value"
        carried.problems.append(Problem(place, " ".join(words), f"cannot be changed: {row.fact}", remedy))
    else:
        carried.always.append(flag(name))


def _put(name: str, place: str, settings: Mapping[str, list[str]], source: Source, carried: Carried) -> None:
    """Give settings of ours to the source, unless it has them already."""
    for ours, words in settings.items():
        key = source.key(ours)
        if key in source.given and source.words(source.given[key]) != words:
            means = "is another name for" if name in RENAMED else "sets"
            rule = f"{means} {flag(ours)}, which is given with a different value"
            carried.problems.append(Problem(place, " ".join(words), rule, "keep one of the two flags"))
            return
        source.given[key] = words if key.startswith("--") else _plain(words)
        carried.origin[key] = place
    if settings:
        texts = (" ".join([flag(ours), *words]) for ours, words in settings.items())
        carried.translated.append(f"{flag(name)} is {' '.join(texts)}")
    else:
        carried.always.append(flag(name))


def _plain(words: list[str]) -> Any:
    return True if not words else words[0] if len(words) == 1 else words


def _read(source: Source, name: str) -> str | None:
    """The first word that the source, or the one beneath it, has for a setting of ours."""
    if (key := source.key(name)) in source.given:
        words = source.words(source.given[key])
        return words[0] if words else None
    found = source.beneath.get(name)
    return None if found is None else str(found)
