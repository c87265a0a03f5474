"""AdamW over the parameter groups that DeepSpeed needs: with and without weight decay, dense and expert
parameters separately.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

from megatron_hyperrouter.config.tree import OptimizerConfig
from megatron_hyperrouter.model.names import decays, router_parameter


def adamw(
    named: Iterable[tuple[str, nn.Parameter]],
    settings: OptimizerConfig,
    *,
    router_lr_mult: float = 1.0,
    stand_in: nn.Parameter | None = None,
) -> torch.optim.AdamW:
    """torch's AdamW; ``named`` gives global names.  Each group has its factor on the learning rate as
    ``lr_mult``, which is ``router_lr_mult`` for the parameters of routers.

    ``stand_in``: see ``model.frozen_parts``.
    """
    kinds: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        factor = router_lr_mult if router_parameter(name) is not None else 1.0
        kinds.setdefault((decays(name, parameter), factor), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "name": f"decay_{decay}_{factor:g}",
            "params": parameters,
            "weight_decay": settings.weight_decay if decay else 0.0,
            "lr_mult": factor,
        }
        for (decay, factor), parameters in sorted(kinds.items(), key=lambda kind: kind[0], reverse=True)
    ]
    split = [
        group for group in split_params_into_different_moe_groups_for_optimizer(groups) if group["params"]
    ]
    if stand_in is not None:
        name = stand_in.group_name  # type: ignore[attr-defined]
        split.append({"params": [stand_in], "moe": True, "name": name, "weight_decay": 0.0, "lr_mult": 1.0})
    return torch.optim.AdamW(
        split,
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        fused=True,  # one pass over each tensor, on the CPU as well
    )


class Clipper:
    """Gradient norm and clipping without ZeRO.  DeepSpeed then reports no norm, and clips experts and
    stages separately.

    Each rank has all gradients here, because ``config.check`` allows ZeRO-0 only with one expert-parallel
    rank and one stage.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, limit: float) -> None:
        """``limit``: largest norm; 0 clips nothing."""
        self.limit = limit or torch.inf
        self.norm = 0.0  # of the last step, before clipping
        optimizer.register_step_pre_hook(self._clip)

    def _clip(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.limit))
