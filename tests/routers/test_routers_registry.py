"""Discovery, options and the lazy front door of the package."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import torch

import megatron_hyperrouter
from megatron_hyperrouter import ROUTERS, build_router
from megatron_hyperrouter.errors import ConfigError
from megatron_hyperrouter.routers.base import Router

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
