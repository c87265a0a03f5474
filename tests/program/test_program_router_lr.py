"""``--router.lr-mult`` on both engines: AdamW's first step moves the router as many times as far, and nothing
else.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from program.launched import Zygote
from program.settings import TINY

from megatron_hyperrouter.checkpoint.folder import find
from megatron_hyperrouter.checkpoint.weights import read_tensors, weight_names
from megatron_hyperrouter.ops import keyed

pytestmark = pytest.mark.processes
ROUTER = "decoder.layers.0.mlp.router.weight_ED"
ONE_STEP = "--train-iters 1 --lr-warmup-iters 0 --lr-decay-style constant --weight-decay 0 --clip-grad 0"


@pytest.mark.parametrize("layout", ["--engine deepspeed --zero-stage 1", "--engine megatron"])
def test_only_the_router_moves_further(zygote: Zygote, text: Path, tmp_path: Path, layout: str) -> None:
    found = []
    for factor in (1, 5):
        run_dir = tmp_path / str(factor)
        flags = ["--router.name", "topk", "--router.lr-mult", factor, "--moe-router-topk", 2, "--seed", 3]
        words = [*TINY, *ONE_STEP.split(), *layout.split(), *flags]
        zygote.run([*words, "--data-path", text, "--run-dir", run_dir])
        folder = find(run_dir)
        assert folder is not None
        found.append(read_tensors(folder, weight_names(folder)))
    once, far = found
    start = keyed.normal(tuple(once[ROUTER].shape), seed=3, name=ROUTER) * 0.02
    moved = once[ROUTER] - start
    assert moved.abs().max() == pytest.approx(1e-2, rel=1e-3)  # the learning rate
    assert torch.allclose(far[ROUTER] - start, 5 * moved, rtol=1e-4, atol=1e-7)
    others = [name for name in once if ".router." not in name]
    assert others and all(torch.equal(once[name], far[name]) for name in others)
