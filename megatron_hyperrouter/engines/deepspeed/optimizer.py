"""AdamW over the parameter groups that DeepSpeed wants: with and without weight decay, dense and expert apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

from megatron_hyperrouter.config.tree import OptimizerConfig
from megatron_hyperrouter.model.names import decays


def adamw(named: Iterable[tuple[str, nn.Parameter]], settings: OptimizerConfig) -> torch.optim.AdamW:
    """torch's AdamW; ``named`` gives global names."""
    trained = list(named)
    groups: list[dict[str, Any]] = []
    for decay in (True, False):
        parameters = [parameter for name, parameter in trained if decays(name, parameter) == decay]
        if parameters:
            groups.append({"name": f"decay_{decay}", "params": parameters, "weight_decay": settings.weight_decay if decay else 0.0})
    split = [group for group in split_params_into_different_moe_groups_for_optimizer(groups) if group["params"]]
    return torch.optim.AdamW(
        split, lr=settings.lr, betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_eps, fused=torch.cuda.is_available()
    )
