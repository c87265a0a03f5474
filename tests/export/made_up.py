"""Run folders out of settings alone, without an engine: random weights, or as many as one likes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from megatron_hyperrouter.analysis.shapes import shapes_of
from megatron_hyperrouter.config.derived import moe_layers
from megatron_hyperrouter.data.tokenize.tokenizer import tokenizer_of
from megatron_hyperrouter.engines.routing import make_router
from megatron_hyperrouter.importing.run_folder import write_run
from megatron_hyperrouter.importing.settings import run_of
from megatron_hyperrouter.train.resuming.run_meta import run_meta

Draw = Callable[[tuple[int, ...]], Tensor]
# A run that transformers has a class for.
TINY: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "moe_ffn_hidden_size": 16,
    "num_experts": 4,
    "moe_router_topk": 2,
    "seq_length": 32,
    "qk_layernorm": True,
}


def make_up(
    home: Path, settings: dict[str, Any], draw: Draw = torch.randn, *, run_dir: str | None = None
) -> None:
    """A run folder at step 0; ``run_dir``: as its settings name it."""
    home.mkdir()
    run = run_of(settings | {"run_dir": run_dir or str(home)})
    vocab_size = tokenizer_of(run.data).vocab_size
    multiple = run.model.make_vocab_size_divisible_by
    shapes = shapes_of(run, -(-vocab_size // multiple) * multiple)
    routers = {
        layer: make_router(run, layer + 1, vocab_size=vocab_size)
        for layer, routed in enumerate(moe_layers(run))
        if routed
    }
    alone = cast("Any", SimpleNamespace(place=SimpleNamespace(rank=0, world_size=1)))
    write_run(home, run, list(shapes), lambda name: draw(shapes[name]), routers, run_meta(run, alone))
