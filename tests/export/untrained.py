"""Run folders of untrained models whose every part bears on the logits: no norm is 1, no matrix is small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from fakes import Alone
from torch import Tensor

from megatron_hyperrouter.checkpoint.description import describe
from megatron_hyperrouter.checkpoint.folder import CheckpointFolders
from megatron_hyperrouter.config.cli import load_file
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.data.tokenize.tokenizer import build_tokenizer
from megatron_hyperrouter.engines import open_engine
from megatron_hyperrouter.routers import ROUTERS
from megatron_hyperrouter.train.resuming.run_meta import run_meta

STEP = 5
BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "moe_ffn_hidden_size": 48,
    "seq_length": 48,
    "num_experts": 8,
    "moe_router_topk": 2,
    "micro_batch_size": 2,
    "global_batch_size": 2,
    "train_iters": 10,
    "init_method_std": 0.15,
    "num_workers": 0,
    "split": "8,1,1",
    "qk_layernorm": True,
}


def make_run(home: Path, text: Path, settings: dict[str, Any]) -> RunConfig:
    """Write ``home`` as a run of ``settings`` over :data:`BASE` leaves it; ``text``: prefix of a byte-level
    corpus.
    """
    home.mkdir(parents=True)
    draft = home / "draft.yaml"
    draft.write_text(yaml.safe_dump(BASE | {"data_path": [str(text)]} | settings | {"run_dir": str(home)}))
    run = load_file(draft, routers=ROUTERS, world_size=1)
    draft.unlink()
    data = run.data
    tokenizer = build_tokenizer(data.tokenizer_type, data.tokenizer_model, data.vocab_size)
    engine = open_engine(run, vocab_size=tokenizer.vocab_size, for_training=False)
    try:
        _shake(engine)
        folders = CheckpointFolders(home / "checkpoints", Alone())
        described = describe(run)
        folders.save(
            STEP,
            engine.save,
            run_meta(run, engine) | described.meta,
            texts=described.texts,
        )
    finally:
        engine.close()
    return run


@torch.no_grad()
def _shake(engine: Any) -> None:
    """Norms away from 1, and the buffers of routers as training leaves them."""
    generator = torch.Generator().manual_seed(1)

    def noise(like: Tensor, std: float) -> Tensor:
        return std * torch.randn(like.shape, generator=generator)

    for name, parameter in engine.holding().named:
        if "layernorm" in name:
            parameter.add_(noise(parameter, 0.2))
    for router in engine.routers.values():
        for name, buffer in router.named_buffers():
            if name == "choice_bias_E":
                buffer.copy_(noise(buffer, 0.05))
            elif name == "frozen_at" and router.config.stage1_share < 1.0:
                buffer.fill_(STEP)
            elif name in ("frozen_word_VW", "frozen_centroid_EW"):
                buffer.copy_(noise(buffer, 1.0))
