"""Exported weights in megatron-core's own model: its spec for Transformer Engine (over a stand-in), its
router, the same losses.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed import REPOSITORY
from engines.layout_worker import tiny_config
from engines.te_ranks import run_afresh
from export.made_up import TINY, make_up

from megatron_hyperrouter.config.by_role import names_with
from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.config.derived import in_effect
from megatron_hyperrouter.config.roles import Role
from megatron_hyperrouter.routers import ROUTERS

pytestmark = pytest.mark.processes
WORKER = Path(__file__).with_name("export_worker.py")
K2 = "--moe-router-topk 2"
LOCAL = "--engine megatron --transformer-impl local"
LOADED = {
    "hyper": f"{LOCAL} --router.name hyper {K2}",
    "deepspeed, topk, untied": f"--router.name topk {K2} --untie-embeddings-and-output-weights --zero-stage "
    "0",
}
REFUSED = {
    f"{LOCAL} --router.name topk --router.bias {K2}": "adds a bias to its logits",
    f"{LOCAL} --router.name topk --router.score-function sigmoid {K2}": "does not compute expert weights",
    f"{LOCAL} --router.name topk --moe-router-topk 1": "k = 1",
    f"--router.name topk --mlp-type residual {K2}": "--mlp-type residual",
    f"--router.name topk --router.scaling-factor 2.5 {K2}": "does not compute expert weights",
    f"--router.name topk --moe-layer-freq 2 {K2}": "does not support: --moe-layer-freq",
    f"--router.name topk --rotary-percent 0.5 {K2}": "does not support: --rotary-percent",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of each case."""
    cases = [*LOADED.values(), *REFUSED]
    task = {"cases": [shlex.split(flags) for flags in cases]}
    return dict(
        zip(cases, run_afresh(WORKER, task, ranks=1, folder=tmp_path_factory.mktemp("export")), strict=True)
    )


@pytest.mark.parametrize("case", LOADED)
def test_megatron_core_scores_the_same(told: dict[str, dict[str, Any]], case: str) -> None:
    answer = told[LOADED[case]]
    assert answer["loss"] == pytest.approx(answer["expected"], rel=1e-6)


@pytest.mark.parametrize("flags", REFUSED)
def test_what_would_be_another_model_is_refused(told: dict[str, dict[str, Any]], flags: str) -> None:
    assert REFUSED[flags] in told[flags]["refused"] and "remedy" in told[flags]["refused"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    make_up(tmp_path / "run", TINY)
    words = ["export-megatron", "--load", str(tmp_path / "run"), "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [
            "bash",
            "-c",
            'ulimit -f 20; exec "$@"',
            "bash",
            sys.executable,
            "-m",
            "megatron_hyperrouter",
            *words,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert done.returncode == 4 and "iter_0000000 cannot be written" in done.stderr
    assert "Traceback" not in done.stderr and not list((tmp_path / "out").iterdir())


def test_flags_describe_the_model() -> None:
    from megatron_hyperrouter.export.megatron import model_flags

    words = model_flags(tiny_config(shlex.split(f"{LOCAL} {K2} --rotary-base 500")))
    ours = {
        "num-layers": 2,
        "hidden-size": 32,
        "num-query-groups": 2,
        "kv-channels": 8,
        "moe-ffn-hidden-size": 48,
        "num-experts": 4,
    }
    for name, value in {**ours, "rotary-base": 500, "moe-router-topk": 2}.items():
        assert words[words.index(f"--{name}") + 1] == str(value)
    assert {"--qk-layernorm", "--swiglu", "--disable-bias-linear"} <= set(words) and "--bf16" not in words


def test_our_own_parser_makes_the_same_model_of_them() -> None:
    from megatron_hyperrouter.export.megatron import model_flags

    run = tiny_config(shlex.split(f"{LOCAL} {K2} --rotary-base 1234567 --bf16"))
    training = "--data-path x --router.name topk --engine megatron"
    again = parse([*model_flags(run), *training.split()], routers=ROUTERS)
    for name in names_with(Role.SHAPE, Role.FUNCTION):
        assert in_effect(again, name) == in_effect(run, name), name
    assert again.train.bf16 and again.model.seq_length == run.model.seq_length
