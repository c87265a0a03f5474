"""What ranks add up after a step or an evaluation: one all-reduce carries all of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hyperrouter.engines.base import EvalResult, Place, StepResult
from megatron_hyperrouter.engines.statistics import RouterStatistics


def step_result(
    loss_sums: Tensor, statistics: RouterStatistics, *, grad_norm: float, stop: bool
) -> tuple[StepResult, Tensor]:
    """Add up the loss, what the routers chose, and who wants to stop (collective); also returns the
    statistics' sums.

    Ratios are taken afterwards, so ranks that saw the same tokens (tensor parallelism) may all be counted.
    """
    rows = statistics.take()
    own = torch.cat(
        [loss_sums, rows.new_tensor([float(stop)]).to(loss_sums.device), rows.to(loss_sums.device).flatten()]
    )
    dist.all_reduce(own)
    own = own.cpu()
    loss, tokens, _, stopped = own[:4].tolist()
    sums = own[4:].view(rows.shape)
    layers, routed = statistics.summary(sums), statistics.routed(sums).tolist()
    result = StepResult(
        lm_loss=loss / max(tokens, 1.0),
        aux_loss=sum(layers["aux"]) / len(routed),
        z_loss=sum(layers["z"]) / len(routed),
        grad_norm=grad_norm,
        entropy_L=tuple(layers["entropy"]),
        load_max_over_mean_L=tuple(layers["load_max_over_mean"]),
        stop=bool(stopped),
        moe_layers=tuple(layer + 1 for layer in routed),
    )
    return result, sums


def eval_result(loss_sums: Tensor, *, replicas: int) -> EvalResult:
    """Add up an evaluation (collective); ``replicas`` ranks counted each token."""
    total = loss_sums.clone()
    dist.all_reduce(total)
    loss, tokens, bytes_ = (total / replicas).tolist()
    return EvalResult(loss_sum=loss, tokens=round(tokens), target_bytes=round(bytes_))


def mean_scale(labels: list[Tensor], place: Place, device: torch.device) -> Tensor:
    """Positions of the global batch / labels of it that count, from this rank's ``_BS`` of a step
    (collective): a float32 scalar.
    """
    counted = torch.stack([(part_BS >= 0).sum() for part_BS in labels]).sum().to(device, torch.float64)
    positions = sum(part_BS.numel() for part_BS in labels) * place.data_size
    dist.all_reduce(counted)
    replicas = place.world_size // place.data_size  # ranks that brought the same labels
    return (positions * replicas / counted.clamp(min=1)).float()


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on all ranks when ``flag`` is true on one (collective)."""
    told = torch.tensor([float(flag)], device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told)


def largest(number: int, device: torch.device) -> int:
    """On all ranks, the largest of their numbers (collective)."""
    told = torch.tensor([number], device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return int(told)


def first_word(word: str) -> str:
    """On all ranks, the word of the first rank that has one (collective, of any length: for what is rare)."""
    words = [""] * dist.get_world_size()
    dist.all_gather_object(words, word)
    return next((each for each in words if each), "")
