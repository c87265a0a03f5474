"""The experts of a checkpoint as plain matrices, from any engine and layout."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_hyperrouter.analysis.jacobian import Experts
from megatron_hyperrouter.checkpoint.weights import read_tensors
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.model.names import router_prefix


def read_experts(checkpoint: Path, config: RunConfig, layer: int) -> Experts:
    """The experts of a layer (from 1), float32."""
    model = config.model
    prefix = router_prefix(layer, model.num_layers).removesuffix("router.") + "experts.local_experts."
    names = [
        [f"{prefix}{expert}.linear_fc{number}.weight" for expert in range(model.num_experts)]
        for number in (1, 2)
    ]
    held = read_tensors(checkpoint, names[0] + names[1])
    return Experts(*(torch.stack([held[name].float() for name in each]) for each in names))
