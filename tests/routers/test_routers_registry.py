"""Discovery, options and the lazy front door of the package."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from functools import partial
from typing import Annotated, get_args, get_origin, get_type_hints

import numpy
import pytest
import torch

import megatron_hyperrouter
from megatron_hyperrouter import ROUTERS, build_router
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.routers.base import Router, RunFacts

SIZES = {"hidden_size": 16, "num_experts": 8, "topk": 2}


def test_importing_the_package_loads_no_torch():
    code = (
        "import sys, megatron_hyperrouter as m; print('torch' in sys.modules, m.__version__, 'ROUTERS' "
        "in dir(m), *sorted(m.ROUTERS))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert said[:3] == ["False", megatron_hyperrouter.__version__, "True"]
    assert said[3:] == sorted(ROUTERS)
    assert {"topk", "smoe_dropout", "hyper"} <= set(said)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = megatron_hyperrouter.nothing


def test_a_second_claim_on_a_name_is_refused():
    with pytest.raises(TypeError, match=r"the router name hyper is used by both HyperRouter and .*Impostor"):

        class Impostor(Router, name="hyper"):
            pass

    assert ROUTERS["hyper"].__name__ == "HyperRouter"


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_every_option_has_a_type_a_default_and_a_help_text(name):
    config = ROUTERS[name].Config
    kinds = get_type_hints(config, include_extras=True)
    config()  # every option has a default
    for field in fields(config):
        assert get_origin(kinds[field.name]) is Annotated, f"{name}.{field.name} needs Annotated[type, help]"
        assert isinstance(get_args(kinds[field.name])[-1], str), f"{name}.{field.name} needs a help text"


def test_unknown_router_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"--router\.name = hiper: is not a router\n    remedy: did you mean hyper\?"
    ):
        build_router("hiper", **SIZES)
    for name in (None, 5, ["hyper"]):  # as a settings file without a name gives
        with pytest.raises(ConfigError, match=r"--router\.name = .*: is not a router"):
            build_router(name, **SIZES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hypernet_width": 0}, "greater than or equal to 1"),
        ({"hypernet_width": "wide"}, "valid integer"),
        ({"init": "large"}, "'width' or 'paper'"),
        ({"bias": 1}, "valid boolean"),
        ({"hypernet_witdh": 3}, "did you mean hypernet_width"),
        ({"embedding_size": -2}, "greater than or equal to 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError) as caught:
        build_router("hyper", **SIZES, **options)
    (problem,) = caught.value.problems
    assert problem.field == f"--router.{next(iter(options))}"
    assert message in str(problem)


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ("hidden_size", 16.0, "--hidden-size = 16.0: must be an integer"),
        ("num_experts", "8", "--num-experts = '8': must be an integer"),
        ("topk", 2.5, "--moe-router-topk = 2.5: must be an integer, or a function"),
        ("topk", True, "--moe-router-topk = True: must be an integer, or a function"),
        ("layer_number", 0, "layer_number = 0: must be an integer from 1"),
        ("seed", 1.5, "seed = 1.5: must be an integer from 0"),
        ("seed", 1 << 64, f"seed = {1 << 64}: must be an integer from 0 to 2^63 - 1"),
        ("aux_loss_coeff", float("nan"), "aux_loss_coeff = nan: must be a finite number >= 0"),
        ("z_loss_coeff", -1.0, "z_loss_coeff = -1.0: must be a finite number >= 0"),
        ("facts", (2, 100, 50), "facts = (2, 100, 50): must be a RunFacts, or None"),
        ("facts", RunFacts(vocab_size=0), "facts.vocab_size = 0: must be an integer >= 1"),
        ("logit_std", float("inf"), "--router.logit_std = inf: must be a finite number"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(argument, value, said):
    with pytest.raises(ConfigError) as caught:
        build_router("stablemoe" if argument == "facts" else "hyper", **{**SIZES, argument: value})
    (problem,) = caught.value.problems
    assert str(problem).startswith(said)


@pytest.mark.parametrize("k", [1.0, 2.5, True, "2"])
def test_k_that_is_no_integer_is_refused_in_a_pass(k):
    router = build_router("topk", **{**SIZES, "topk": lambda step: k})
    for call in (router, partial(build_router("topk", **SIZES), topk=k)):
        with pytest.raises(ValueError, match=re.escape(f"topk = {k!r}: must be an integer")):
            call(torch.ones(3, 16))


def test_integers_of_other_libraries_count():
    small = {name: numpy.int64(value) for name, value in SIZES.items()}
    x_TD = torch.randn(3, 16)
    found = build_router("topk", **small, aux_loss_coeff=numpy.float32(0.5))(x_TD, topk=torch.tensor(3))
    wanted = build_router("topk", **SIZES, aux_loss_coeff=0.5)(x_TD, topk=3)
    assert torch.equal(found.experts_TK, wanted.experts_TK)
    assert torch.equal(found.losses["aux"], wanted.losses["aux"])


@pytest.mark.parametrize(
    ("name", "options", "warns"),
    [
        ("topk", {}, True),
        ("topk", {"pre_softmax": True}, False),
        ("hyper", {}, True),
        ("smoe_dropout", {}, False),
    ],
)
def test_warning_exactly_where_k1_gives_no_gradient(name, options, warns):
    """The warning is right: the task loss reaches the router's own parameters, or does not."""
    router = build_router(name, **{**SIZES, "topk": 1}, **options)
    assert any("k = 1" in line for line in router.config.warnings(topk=1)) == warns
    assert not list(router.config.warnings(topk=2))
    x_TD = torch.randn(10, 16)
    for k, learns in ((1, not warns), (2, True)):
        weights_TK = router(x_TD, topk=k).weights_TK
        if not list(router.parameters()):
            assert not weights_TK.requires_grad
            continue
        router.zero_grad()
        (weights_TK[:, 0] * x_TD[:, 0]).sum().backward()
        assert any(parameter.grad.any() for parameter in router.parameters()) == learns
