"""Builds one set of settings: merges the sources, validates each leaf, and collects the problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

from megatron_hyperrouter.config import check
from megatron_hyperrouter.config.leaves import ROUTER_PREFIX, Leaf, flag, router_leaves, sections, tree_leaves
from megatron_hyperrouter.config.megatron.carry import (
    Carried,
    Source,
    carry_over,
    contradictions,
    settled,
    words_of,
    work_out,
)
from megatron_hyperrouter.config.reading import foreign
from megatron_hyperrouter.config.reading.sources import YamlFile
from megatron_hyperrouter.config.reading.values import (
    convert,
    from_file,
    from_words,
    nearest,
    switched_off,
)
from megatron_hyperrouter.config.tree import RouterChoice, RunConfig
from megatron_hyperrouter.errors import BadValue, ConfigError, Problem

ROUTER_NAME = "router.name"
ABSENT: Final = object()


class Draft:
    """Settings from ``flags`` (as written), ``overrides`` (flat names, typed values) and ``file``, in
    this order of precedence.
    """

    def __init__(
        self,
        routers: Mapping[str, Any],
        file: YamlFile,
        *,
        flags: Mapping[str, list[str]] | None = None,
        overrides: Mapping[str, object] | None = None,
        problems: Sequence[Problem] = (),
    ) -> None:
        self.routers = routers
        self.file = file
        self.flags = dict(flags or {})
        self.overrides = dict(overrides or {})
        self.values = dict(file.values)
        self.problems = [*problems, *file.problems]
        self.unsure: set[str] = set()  # settings whose intended value is not known
        self.written: dict[str, bool] = {}  # settings that some source gives -> whether a flag gives it
        self.carried = Carried()
        self._notes: list[str] = []

    def finish(self, *, world_size: int | None) -> RunConfig:
        """The checked settings; raises ConfigError with every problem."""
        self._carry_over()
        router = self._router()
        values = {name: self._take(leaf) for name, leaf in tree_leaves().items()}
        self._work_out(values, world_size)
        self._report_unknown(router.name)
        config = RunConfig(
            router=router,
            **{
                section: config_type(
                    **{name: values[name] for name, leaf in tree_leaves().items() if leaf.section == section}
                )
                for section, config_type in sections().items()
            },
        )
        if self.file.readable:  # otherwise everything that the file says would seem to be missing
            self.problems += check.problems(config, world_size=world_size, unsure=self.unsure)
        if self.problems:
            raise ConfigError(self.problems)
        return config

    def notes(self) -> list[str]:
        """Notes for the user on how the settings were interpreted."""
        return [*self.carried.notes(), *self._notes]

    def _carry_over(self) -> None:
        """Replace Megatron-LM's names by ours."""
        options = {name for router in self.routers for name in self._options_of(router)}
        leaves = tree_leaves()
        ours = {
            *leaves,
            *options,
            ROUTER_NAME,
            *(_plain(leaf.off_flag) for leaf in leaves.values() if leaf.off_flag),
        }
        file = Source(self.values, str, lambda key: f"{key} in {self.file.path}", words_of)
        carry_over(Source(self.flags, flag, str, list, self.values), ours, self.carried)
        carry_over(file, ours, self.carried)
        self.problems += self.carried.problems
        self.unsure |= self.carried.unsure

    def _work_out(self, values: dict[str, Any], world_size: int | None) -> None:
        """Compute settings that are given in other units, and switch off settings that cannot be on."""
        self.problems += contradictions(self.carried, values)
        found = work_out(self.carried, values, self.written, world_size)
        if found:
            self.problems += found
            self.unsure.update(("train_iters", "lr_decay_iters", "lr_warmup_iters"))
        self._notes += settled(values, self.written)

    def _router(self) -> RouterChoice:
        default = RouterChoice().name
        in_file = str(self.values.get(ROUTER_NAME, default))
        chosen = self._take(
            Leaf("router", ROUTER_NAME, Literal[tuple(sorted(self.routers))], (), False, default, "router")
        )
        if ROUTER_NAME in self.unsure:
            self.values = {
                name: value for name, value in self.values.items() if not name.startswith(ROUTER_PREFIX)
            }
            self.flags = {
                name: words for name, words in self.flags.items() if not name.startswith(flag(ROUTER_PREFIX))
            }
        elif chosen != in_file:
            self._forget_options_of(in_file)
        if chosen not in self.routers:
            return RouterChoice(name=chosen)
        config_type = self.routers[chosen].Config
        options = {
            name.removeprefix(ROUTER_PREFIX): self._take(leaf)
            for name, leaf in router_leaves(config_type).items()
        }
        return RouterChoice(name=chosen, options=config_type(**options))

    def _forget_options_of(self, replaced: str) -> None:
        """Drop the file's options for a router that a flag has replaced.  Options that this router does
        not have stay, and are reported.
        """
        for name in list(self.values):
            if name.startswith(ROUTER_PREFIX) and (
                replaced not in self.routers or name in self._options_of(replaced)
            ):
                del self.values[name]

    def _options_of(self, router: str) -> Mapping[str, Leaf]:
        return router_leaves(self.routers[router].Config) if router in self.routers else {}

    def _take(self, leaf: Leaf) -> Any:
        """The value of one setting, from the strongest source that gives it.  The setting is removed from
        all sources.
        """
        in_file = self.values.pop(leaf.name, ABSENT)
        override = self.overrides.pop(leaf.name, ABSENT)
        words = self.flags.pop(leaf.flag, None)
        off = self.flags.pop(leaf.off_flag, None) if leaf.off_flag else None
        stronger = (override, words, off) != (ABSENT, None, None)
        if stronger or in_file is not ABSENT:
            self.written[leaf.name] = stronger
        if off is not None:
            return self._attempt(
                leaf, str(leaf.off_flag), " ".join(off), lambda: switched_off(leaf, words, off)
            )
        if words is not None:
            shown = " ".join(words)
            shown = repr(shown) if words and not shown.strip() else shown
            place = self.carried.origin.get(leaf.flag, leaf.flag)
            return self._attempt(leaf, place, shown, lambda: from_words(leaf, words))
        if override is not ABSENT:
            return self._attempt(leaf, leaf.flag, override, lambda: convert(leaf, override))
        if in_file is not ABSENT:
            place = self.carried.origin.get(leaf.name, f"{leaf.flag} ({leaf.name} in {self.file.path})")
            shown = repr(in_file) if isinstance(in_file, str) and not in_file.strip() else in_file
            return self._attempt(leaf, place, shown, lambda: from_file(leaf, in_file))
        return leaf.default

    def _attempt(self, leaf: Leaf, place: str, shown: object, read: Callable[[], Any]) -> Any:
        """The result of ``read``; for a bad value the default, and a problem."""
        try:
            return read()
        except BadValue as bad:
            self.problems.append(Problem(place, shown, bad.rule, bad.remedy))
            self.unsure.add(leaf.name)
            return leaf.default

    def _report_unknown(self, router: str) -> None:
        """Report everything that is not a known setting."""
        for name, words in self.flags.items():
            self._unknown(name, _plain(name), " ".join(words), "unknown flag", router)
        for name, value in self.overrides.items():
            self._unknown(flag(name), name, value, "unknown setting", router)
        for name, value in self.values.items():
            self._unknown(f"{name} in {self.file.path}", name, value, "unknown setting", router)

    def _unknown(self, place: str, name: str, value: object, rule: str, router: str) -> None:
        leaves = {**tree_leaves(), **self._options_of(router)}
        off = {_plain(leaf.off_flag): leaf.name for leaf in leaves.values() if leaf.off_flag}
        known = [*leaves, *off, ROUTER_NAME, "config"]
        written = flag if place.startswith("--") else str
        owners = [other for other in self.routers if name in self._options_of(other)]
        if owners:
            place = self.carried.origin.get(place if place.startswith("--") else name, place)
            if any(problem.field == place for problem in self.problems):
                return  # one flag of Megatron-LM may become several options
            rule = f"is not an option of router {router}; it is an option of {', '.join(owners)}"
            remedy = f"leave it out, or use --router.name {owners[0]}"
        elif name in off:
            self.unsure.add(off[name])
            meant = "true" if value in (False, "false") else "false"
            remedy = f"write {off[name].removeprefix(ROUTER_PREFIX)}: {meant}"
        elif name in foreign.REMEDIES:
            remedy = foreign.REMEDIES[name]
        elif ours := foreign.OURS.get(name):
            self.unsure.add(ours)
            remedy = f"use {written(ours)}, its name in this program"
        elif close := nearest(name, known):
            self.unsure.add(off.get(close, close))
            remedy = f"did you mean {written(close)}?"
        else:
            remedy = (
                "look for the right name in mhr train --help; the run may change if you only remove the "
                "setting"
            )
        self.problems.append(Problem(place, value, rule, remedy))


def _plain(flag_name: str) -> str:
    """``--no-bf16`` -> ``no_bf16``."""
    return flag_name.removeprefix("--").replace("-", "_")
