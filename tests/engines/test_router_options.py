"""Options that look at places of tokens, at sequences and at the load of a global batch give one run on every
layout of both engines.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engines.layout_table import Layout, Table, assert_same_run, run_table
from program.launched import Zygote

OPTIONS = {
    "deepseek": "--router.score-function sigmoid --router.renormalise --router.expert-bias "
    "--router.bias-update-rate 0.05 "
    "--router.aux-loss sequence --router.init-std 0.2",
    "switch": "--router.pre-softmax --router.jitter-eps 0.1 --router.aux-loss global_batch "
    "--router.init-std 0.2",
}
# In two dimensions, half of four experts, tokens near the origin of the projection would turn rounding into
# directions.
XMOE = "xmoe --router.projection-size 16"
TP2, PP2, EP2 = (
    "--tensor-model-parallel-size 2",
    "--pipeline-model-parallel-size 2",
    "--expert-model-parallel-size 2",
)
LAYOUTS = {
    "deepspeed, EP2": Layout(2, EP2),
    "deepspeed, TP2": Layout(2, TP2),
    "deepspeed, PP2": Layout(2, PP2),
    "megatron, 1 rank": Layout(1, "--engine megatron"),
    "megatron, EP2": Layout(2, f"--engine megatron {EP2}"),
    "megatron, TP2, SP": Layout(2, f"--engine megatron {TP2} --sequence-parallel"),
    "megatron, CP2": Layout(2, "--engine megatron --context-parallel-size 2"),
    "megatron, PP2": Layout(2, f"--engine megatron {PP2}"),
}
WITH_OPTIONS = {
    f"{name}: {where}": layout._replace(settings=options)
    for name, options in OPTIONS.items()
    for where, layout in LAYOUTS.items()
}


@pytest.fixture(scope="module")
def topk(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return run_table(zygote, WITH_OPTIONS, ["topk"], tmp_path_factory.mktemp("topk"))


@pytest.fixture(scope="module")
def xmoe(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return run_table(zygote, LAYOUTS, [XMOE], tmp_path_factory.mktemp("xmoe"))


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_topk_gives_the_run_of_one_process(
    topk: Table, name: str, record_property: Callable[[str, object], None]
) -> None:
    assert_same_run(topk, "topk", name, record_property)


@pytest.mark.parametrize("name", LAYOUTS)
def test_xmoe_gives_the_run_of_one_process(
    xmoe: Table, name: str, record_property: Callable[[str, object], None]
) -> None:
    assert_same_run(xmoe, XMOE, name, record_property)
