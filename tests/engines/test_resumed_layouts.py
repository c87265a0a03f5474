"""A run that goes on from its checkpoint repeats its losses bit for bit, on the layouts that the program
tests leave out.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed import run_ranks
from engines.test_family_layouts import FAMILIES, MTP
from program.launched import Zygote

# Dense layers, shared experts, latent attention, groups of experts whose bias moves, more tokens ahead
LATENT, PREDICTING = (family.removeprefix("hyper ") for family in (FAMILIES["latent, groups"], MTP))
WORKER = Path(__file__).with_name("layout_worker.py")
TP2 = "--tensor-model-parallel-size 2"
LAYOUTS = {
    1: ["--engine megatron --bf16", PREDICTING],
    2: [
        "--engine megatron --expert-model-parallel-size 2 --use-distributed-optimizer --ddp-bucket-size 500",
        "--engine megatron --pipeline-model-parallel-size 2",
        "--engine megatron --pipeline-model-parallel-size 2 --virtual-pipeline-model-parallel-size 2 "
        "--num-layers 4",
        "--engine megatron --context-parallel-size 2 --use-distributed-optimizer",
        f"--engine megatron {TP2} --sequence-parallel --expert-tensor-parallel-size 1",
        TP2,
        f"--expert-model-parallel-size 2 --zero-stage 2 {LATENT}",
        f"--engine megatron --expert-model-parallel-size 2 {LATENT}",
    ],
    4: [
        f"--engine megatron {TP2} --sequence-parallel --expert-model-parallel-size 2 "
        "--use-distributed-optimizer",
        "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2",
    ],
}


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_resumes_bit_for_bit(ranks: int, tmp_path: Path, zygote: Zygote) -> None:
    cases = [
        {
            "flags": ["--router.name", "hyper", *flags.split()],
            "steps": 2,
            "folder": str(tmp_path / str(number)),
            "resume": True,
        }
        for number, flags in enumerate(LAYOUTS[ranks])
    ]
    for flags, answer in zip(
        LAYOUTS[ranks], run_ranks(zygote, WORKER, {"cases": cases}, ranks=ranks, folder=tmp_path), strict=True
    ):
        first, again = answer["steps"][2:4], answer["steps"][4:6]
        assert first == again, flags
        assert first[0]["lm_loss"] != first[1]["lm_loss"]
