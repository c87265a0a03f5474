"""Products in fp8, over a stand-in for Transformer Engine that rounds within megatron-core's contexts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from engines.te_ranks import run_afresh

from megatron_hyperrouter.config.cli import parse
from megatron_hyperrouter.engines import open_engine
from megatron_hyperrouter.errors import HostError
from megatron_hyperrouter.routers import ROUTERS

pytestmark = pytest.mark.processes
STEPS = 3
TE = (
    "--router.name hyper --engine megatron --transformer-impl transformer_engine --bf16 "
    "--moe-ffn-hidden-size 64"
)
CASES = {
    "bfloat16": TE,
    "delayed": f"{TE} --fp8-format hybrid",
    "mxfp8": f"{TE} --fp8-format e4m3 --fp8-recipe mxfp8",
    "mxfp8, no layer left": f"{TE} --fp8-format e4m3 --fp8-recipe mxfp8 --first-last-layers-bf16",
    "mxfp8, first layer left": f"{TE} --fp8-format e4m3 --fp8-recipe mxfp8 --first-last-layers-bf16 "
    "--num-layers-at-start-in-bf16 0",
}


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of the steps of each case."""
    folder = tmp_path_factory.mktemp("fp8")
    cases: list[dict[str, Any]] = [{"flags": flags.split(), "steps": STEPS} for flags in CASES.values()]
    told = run_afresh(Path(__file__).with_name("te_worker.py"), {"cases": cases}, ranks=1, folder=folder)
    return {
        name: [step["lm_loss"] for step in answer["steps"]] for name, answer in zip(CASES, told, strict=True)
    }


@pytest.mark.parametrize("name", ["delayed", "mxfp8", "mxfp8, first layer left"])
def test_layers_compute_in_fp8(losses: dict[str, list[float]], name: str) -> None:
    """The stand-in rounds every product of the layers, so the losses move, but not far."""
    for loss, in_bf16 in zip(losses[name], losses["bfloat16"], strict=True):
        assert math.isfinite(loss) and 1e-6 < abs(loss - in_bf16) < 0.05 * in_bf16


def test_first_and_last_layers_stay_in_bfloat16(losses: dict[str, list[float]]) -> None:
    assert losses["mxfp8, no layer left"] == losses["bfloat16"]
    assert losses["mxfp8, first layer left"] != losses["mxfp8"]


def test_without_transformer_engine_it_is_refused() -> None:
    flags = f"{CASES['delayed']} --data-path none --train-iters 1 --lr 1e-3 --transformer-impl auto"
    config = parse([*flags.split(), "--tokenizer-type", "ByteTokenizer"], routers=ROUTERS, world_size=1)
    with pytest.raises(HostError, match="--fp8-format: Transformer Engine is not installed") as caught:
        open_engine(config, vocab_size=64)
    assert caught.value.exit_status == 5 and "leave out --fp8-format" in str(caught.value.remedy)
