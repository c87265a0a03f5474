"""docs/routers.md agrees with the code: sections, options, tensors, counts, and which routers fold."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_hyperrouter import ROUTERS, build_router
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.config.leaves import flag
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.routers import Router
from megatron_hyperrouter.routers.base import Tokens
from megatron_hyperrouter.routers.choice import ChoosingRouter

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "routers.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
NAMES = sorted(ROUTERS)

T, D, E = 20, 24, 8
# sizes at the defaults
LETTERS = {
    "D": D,
    "E": E,
    "S": D,
    "H": 256,
    "P": E // 2,
    "V": 256,
    "W": 50,
    "A": 64,
    "F": E,
}
EVERYTHING: dict[str, dict[str, Any]] = {  # options with which all tensors of a router are there
    "topk": {"bias": True, "expert_bias": True, "aux_loss": "global_batch"},
    "simsmoe": {"bias": True},
}


class Costs(NamedTuple):
    """A router's line in the table of costs."""

    trained: str
    kept: str
    flops: str
    folds: str
    time: str


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the table whose first heading is this one."""
    (body,) = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in body.splitlines()]


COSTS = {name.strip("`"): Costs(*cells) for name, *cells in rows(PAGE, "router")}


def defaults_of(config: type) -> dict[str, str]:
    """Flag -> default as the page writes it."""
    words = {"True": "on", "False": "off", "None": "none"}
    found = {flag(f"router.{each.name}"): str(each.default) for each in fields(config)}
    return {option: words.get(default, default) for option, default in found.items()}


def told(text: str, heading: str) -> dict[str, str]:
    """Flag -> default, from a table of options."""
    return {option.strip("`"): default.split(" (")[0] for option, default, _ in rows(text, heading)}


SHARED = {whose: told(PAGE, f"option of {whose}") for whose in ("every router", "these three")}


def small(name: str, **options: Any) -> Router:
    return build_router(name, hidden_size=D, num_experts=E, topk=2, **options)


def number(formula: str) -> Any:
    """The value of a formula in the letters of the page: digits, letters, ``+ - * //`` and brackets."""
    code = formula.strip("`")
    assert re.fullmatch(r"[A-Z\d+*/(), -]+", code), formula
    return eval(code, {"__builtins__": {}}, LETTERS)


def test_every_router_has_a_section_and_a_line_of_costs():
    assert sorted(SECTIONS) == sorted(COSTS) == NAMES
    assert len(PAGE.splitlines()) <= 440


@pytest.mark.parametrize("name", NAMES)
def test_options_and_their_defaults(name):
    real = defaults_of(ROUTERS[name].Config)
    for family, told_once in ((Router, SHARED["every router"]), (ChoosingRouter, SHARED["these three"])):
        if issubclass(ROUTERS[name], family):
            assert told_once.items() <= real.items()
            real = {option: default for option, default in real.items() if option not in told_once}
    assert told(SECTIONS[name], "option") == real


def test_what_routers_share_is_told_once():
    assert SHARED["every router"] == defaults_of(Router.Config)
    assert SHARED["every router"] | SHARED["these three"] == defaults_of(ChoosingRouter.Config)


@pytest.mark.parametrize("name", NAMES)
def test_no_section_names_an_option_of_nobody(name):
    own = {flag(f"router.{each.name}") for each in fields(ROUTERS[name].Config)}
    assert set(re.findall(r"--router\.[\w-]+", SECTIONS[name])) <= own


def test_the_other_flags_exist():
    everyone = {flag(f"router.{each.name}") for cls in ROUTERS.values() for each in fields(cls.Config)}
    routers = {option.replace("router.no-", "router.") for option in re.findall(r"--router\.[\w-]+", PAGE)}
    assert routers <= everyone | {"--router.name"}
    tree = RunConfig()
    leaves = {
        flag(leaf.name)
        for section in fields(tree)
        if section.name != "router"
        for leaf in fields(getattr(tree, section.name))
    }
    named = set(re.findall(r"(?<![\w-])--(?!router)[a-z][\w-]+", PAGE))
    assert {each for each in named if each not in leaves} <= {f"--no-{each[2:]}" for each in leaves}


@pytest.mark.parametrize("name", NAMES)
def test_options_in_commands_make_the_router_that_they_promise(name):
    """``topk --router.x --router.y value`` in the chooser is accepted by that router."""
    for command in re.findall(rf"`{name} (--router[^`]*)`", PAGE):
        config = parse(
            ["--data-path", "a", "--router.name", name, *command.split()], routers=ROUTERS, world_size=1
        )
        assert config.router.options != ROUTERS[name].Config()


@pytest.mark.parametrize("name", NAMES)
def test_tensors(name):
    """Every tensor of a checkpoint is in the table with its shape, and is called trained exactly where it is
    a parameter.
    """
    router = small(name, **EVERYTHING.get(name, {}))
    state, parameters = router.state_dict(), dict(router.named_parameters())
    told = {
        tensor.strip("`"): (number(shape), kind) for tensor, shape, kind in rows(SECTIONS[name], "tensor")
    }
    assert {tensor: shape for tensor, (shape, _) in told.items()} == {
        key: tuple(value.shape) for key, value in state.items()
    }
    kind = ""
    for tensor, (_, words) in told.items():
        kind = kind if words == "the same" else words
        assert kind.startswith("trained" if tensor in parameters else "buffer"), tensor
        assert tensor not in parameters or parameters[tensor].requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_tensors_with_an_option_come_and_go_with_it(name):
    bare = set(small(name).state_dict())
    for tensor, _, kind in rows(SECTIONS[name], "tensor"):
        assert (tensor.strip("`") in bare) == (
            "with `--router" not in kind.replace("none with", "") or kind.startswith("trained; ")
        ), tensor


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_a_layer(name):
    router = small(name)
    assert number(COSTS[name].trained) == sum(
        each.numel() for each in router.parameters() if each.requires_grad
    )
    buffers = sum(
        each.numel() for key, each in router.named_buffers() if key not in ("frozen_seed", "frozen_hash")
    )
    frozen = router.frozen.tensors if hasattr(router, "frozen") else ()
    assert number(COSTS[name].kept) == buffers + sum(each.numel() for each in frozen)


@pytest.mark.parametrize("name", NAMES)
def test_flops_of_a_token(name):
    router = small(name)
    tokens = Tokens(torch.arange(T) % 7, torch.arange(T), T)
    counts = FlopCounterMode(display=False)
    with counts:
        router(torch.randn(T, D), tokens=tokens)
    assert counts.get_total_flops() == T * number(COSTS[name].flops)


@pytest.mark.parametrize("name", NAMES)
def test_folding(name):
    told = COSTS[name].folds
    if told == "yes":
        assert folds(small(name))
        return
    assert not folds(small(name))
    option = re.fullmatch(r"only with `--router\.no-([\w-]+)`", told)
    assert (told == "no") != bool(option)
    assert option is None or folds(small(name, **{option[1].replace("-", "_"): False}))


def folds(router: Router) -> bool:
    """Whether a topk router with the same routes and weights comes of it."""
    try:
        plain = router.fold()
    except NotImplementedError:
        return False
    x_TD = torch.randn(T, D)
    ours, theirs = router.eval()(x_TD), plain.eval()(x_TD)
    assert plain.name == "topk" and torch.equal(ours.experts_TK, theirs.experts_TK)
    torch.testing.assert_close(ours.weights_TK, theirs.weights_TK)
    return True


@pytest.mark.parametrize("name", NAMES)
def test_a_paper_that_the_code_cites_is_cited(name):
    """Section and file name the same papers, by their arXiv numbers."""
    code = (
        Path(__file__)
        .resolve()
        .parent.parent.joinpath("megatron_hyperrouter", "routers", f"{name}.py")
        .read_text(encoding="utf-8")
    )
    cited = set(re.findall(r"\d{4}\.\d{5}", code))
    assert cited and cited <= set(re.findall(r"\d{4}\.\d{5}", SECTIONS[name]))


@pytest.mark.parametrize("name", NAMES)
def test_each_section_answers_the_same_questions(name):
    for question in (r"\*\*Folding\*\*", "[Ee]valuation", r"\*\*Differences\*\*", r"\*\*Communication\b"):
        assert re.search(question, SECTIONS[name]), question
