"""Initial weights as a function of (seed, global parameter name) only, independent of layout, device and
library version.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from megatron_hyperrouter.config.tree import ModelConfig
from megatron_hyperrouter.model.names import matrices, router_parameter
from megatron_hyperrouter.model.sharding import shard_of

_OUTPUT_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")


def initial_std(name: str, model: ModelConfig) -> float:
    """Megatron-LM's rule: N(0, std^2), and std / sqrt(2 x layers) for the matrices that write into the
    residual stream.
    """
    if name.endswith(_OUTPUT_PROJECTIONS):
        return model.init_method_std / math.sqrt(2 * model.num_layers)
    return model.init_method_std


def initialise(
    named: Iterable[tuple[str, nn.Parameter]],
    model: ModelConfig,
    draw: Callable[[str, tuple[int, ...]], Tensor],
) -> None:
    """Fill every parameter but the routers', which fill themselves.

    ``named`` gives global names; ``draw(name, shape)`` gives float32 N(0, 1) numbers that depend on the name
    alone.
    """
    with torch.no_grad():
        for name, parameter in matrices(named):
            if router_parameter(name) is not None:
                continue
            if "layernorm" in name or name.endswith(("enorm.weight", "hnorm.weight")):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                shard = shard_of(name)
                shape = tuple(parameter.shape) if shard is None else shard.whole_shape(parameter.shape)
                whole = draw(name, shape) * initial_std(name, model)
                parameter.copy_(whole if shard is None else shard.cut(whole))
