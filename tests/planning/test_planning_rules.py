"""Every rule of ``config/rules`` appears as a refusal: of a layout, or of the settings of a plan."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module
from pathlib import Path

import pytest
from config import rule_cases_family, rule_cases_first, rule_cases_second
from config.rule_case import Case, case

from megatron_hyperrouter.commands.cluster.plan import settings_of
from megatron_hyperrouter.config import check, rules
from megatron_hyperrouter.config.cli import dump, parse, replace_leaves
from megatron_hyperrouter.config.rules import megatron
from megatron_hyperrouter.config.rules.base import Rule
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.planning.layouts import Candidate, Refusal, structures, without_layout
from megatron_hyperrouter.routers import ROUTERS

RULES: dict[str, Rule] = {rule.__name__: rule for rule in check.RULES}
CASES = [*rule_cases_first.CASES, *rule_cases_second.CASES, *rule_cases_family.CASES]
OWN = {  # where the case of tests/config is about a router that only those tests have
    "router_options": case(
        "router_options", {"router.num_groups": 2}, "--router.num-groups", "needs --router.group-topk", {}
    )
}
SWITCHED_OFF = "sequence_parallel_needs_tensor_parallel"  # as Megatron-LM does, so nothing is refused
# What a plan never asks for, and why; a dry run of the program refuses it.
UNTRIED = {
    "world_by_layout": "sizes divide the GPUs",
    "expert_tensor_parallel_is_all_or_none": "it is 1 or as large as tensor parallelism",
    "tensor_parallel_experts_need_sequence_parallel": "it comes with tensor parallelism",
    "named_stages_fit": "stages are equal",
    "virtual_pipeline_needs_pipeline": "chunks come with stages",
    "micro_batches_by_pipeline": "chunks come where micro-batches go round",
    "in_this_version": "context parallelism and chunks are for the megatron engine",
    "zero_2_without_pipeline": "with stages it is ZeRO-1",
    "zero_0_alone": "ZeRO-1 is the least",
}


def cases_of(name: str) -> list[Case]:
    return [OWN[name]] if name in OWN else [each for each in CASES if each.rule == name]


@pytest.fixture(autouse=True)
def no_deep_ep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers where it is installed."""
    monkeypatch.setattr(megatron, "installed", lambda library: library != "deep_ep")


def written(folder: Path, settings: dict[str, object]) -> str:
    base = parse(["--data-path", "corpus"], routers=ROUTERS)
    file = folder / "settings.yaml"
    file.write_text(dump(replace_leaves(base, **settings)), encoding="utf-8")
    return str(file)


def reasons_of_plan(file: str, gpus: int) -> list[str]:
    """All that a plan refuses for: the settings themselves, or layouts."""
    try:
        config, engines, _ = settings_of(file, [])
    except ConfigError as error:
        return [f"{problem.field}: {problem.rule}" for problem in error.problems]
    tried: list[Candidate | Refusal] = [*structures(without_layout(config, gpus), gpus, gpus, engines)]
    return [each.reason for each in tried if isinstance(each, Refusal)]


@pytest.mark.parametrize("name", sorted(RULES.keys() - UNTRIED.keys() - {SWITCHED_OFF}))
def test_a_plan_refuses(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With this rule alone in force, so that no other can speak for it."""
    monkeypatch.setattr(check, "RULES", (RULES[name],))
    refused = []
    for each in cases_of(name):
        file = written(tmp_path, each.settings)
        refused += [each.field in reason for gpus in (8, 12) for reason in reasons_of_plan(file, gpus)]
    assert refused and all(refused)


@pytest.mark.parametrize("name", sorted(UNTRIED))
def test_a_plan_never_tries(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "RULES", (RULES[name],))
    for each in cases_of(name):
        file = written(tmp_path, each.settings)
        assert not reasons_of_plan(file, 8) and not reasons_of_plan(file, 12)
        with pytest.raises(ConfigError) as caught:  # as the program's --dry-run --world-size N
            parse(["--config", file], routers=ROUTERS, world_size=each.world_size or 8)
        assert any(each.words in problem.rule for problem in caught.value.problems)


def test_sequence_parallelism_of_one_rank_is_switched_off(tmp_path: Path) -> None:
    (each,) = cases_of(SWITCHED_OFF)
    file = written(tmp_path, each.settings)
    assert not parse(["--config", file], routers=ROUTERS, world_size=1).parallel.sequence_parallel


def written_rules() -> set[str]:
    """The functions of all files in the room that look like a rule, whether or not they are in force."""
    found = set()
    for file in pkgutil.iter_modules(rules.__path__):
        module = import_module(f"{rules.__name__}.{file.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            signature = inspect.signature(function)
            is_rule = list(signature.parameters) == ["config", "world_size"]
            is_rule &= signature.return_annotation == "Iterator[Problem]" and not name.startswith("_")
            if is_rule and function.__module__ == module.__name__:
                found.add(name)
    return found


def test_no_rule_is_left_out_silently() -> None:
    """A new rule is in force, and one of the tests above is about it."""
    assert written_rules() == RULES.keys()
    assert UNTRIED.keys() <= RULES.keys()
    assert all(cases_of(name) for name in RULES)
