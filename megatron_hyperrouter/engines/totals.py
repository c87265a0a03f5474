"""What ranks add up after a step or an evaluation, in one all-reduce."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_hyperrouter.engines.base import GIVE_UP, EvalResult, OwnPart, RankPlace, StepResult
from megatron_hyperrouter.engines.profile import OwnTimes
from megatron_hyperrouter.engines.statistics import RouterStatistics
from megatron_hyperrouter.model.names import matrices
from megatron_hyperrouter.model.sharding import (
    is_second_copy,
    replica_place,
    shard_of,
    tensor_parallel_place,
)

_NOT_MEASURED = OwnTimes()


class Judgement:
    """Decides once in each step, before the optimizer changes anything, whether the step counts."""

    def __init__(self) -> None:
        self._decide: Callable[[float], bool] = bool
        self._allowed: bool | None = None

    def begin(self, decide: Callable[[float], bool]) -> None:
        """A step begins; ``decide`` gets the gradient norm, and is the same on all ranks (collective)."""
        self._decide, self._allowed = decide, None

    def allows(self, norm: float) -> bool:
        """Whether the weights may change; decided at the first call."""
        if self._allowed is None:
            self._allowed = self._decide(norm)
        return self._allowed


def step_result(
    loss_sums: Tensor,
    statistics: RouterStatistics,
    place: RankPlace,
    *,
    grad_norm: float,
    stop: int,
    memory: int,
    times: OwnTimes = _NOT_MEASURED,
) -> tuple[StepResult, Tensor]:
    """Add up the loss, the routers' choices, and the requests to stop (collective); also returns the sums
    of the statistics.

    ``memory``: largest number of bytes that this rank has needed.  Each rank fills its own elements, so
    the sum over ranks contains all of them and needs no separate reduction.

    Ratios are computed from the sums, so ranks that processed the same tokens (tensor parallelism) may all
    be counted.
    """
    rows = statistics.take()
    ranks = place.world_size
    told = torch.zeros(2 + 3 * ranks, dtype=loss_sums.dtype, device="cpu")  # one copy, when it is complete
    told[0], told[1] = stop, times.total * place.is_main
    told[2 + place.rank :: ranks] = told.new_tensor((memory, times.waited, times.computed))
    parts = (loss_sums, told.to(loss_sums.device, non_blocking=True), rows.to(loss_sums.device).flatten())
    total = torch.cat(parts)
    dist.all_reduce(total)
    loss_part, told, rest = total.cpu().split([len(part) for part in parts])
    loss, tokens, _ = loss_part.tolist()
    stopped, seconds, *numbers = told.tolist()
    memory_R, waits_R, computed_R = (numbers[start : start + ranks] for start in range(0, 3 * ranks, ranks))
    sums = rest.view(rows.shape)
    layers, routed = statistics.summary(sums), statistics.routed(sums).tolist()
    result = StepResult(
        lm_loss=loss / max(tokens, 1.0),
        aux_loss=sum(layers["aux"]) / len(routed),
        z_loss=sum(layers["z"]) / len(routed),
        grad_norm=grad_norm,
        layers={name: tuple(values_L) for name, values_L in layers.items()},
        stop=bool(stopped),
        give_up=stopped >= GIVE_UP,
        peak_memory=round(max(memory_R)),
        seconds=seconds,
        data_waits=tuple(waits_R),
        compute_times=tuple(computed_R),
        moe_layers=tuple(layer + 1 for layer in routed),
    )
    return result, sums


def eval_result(loss_sums: Tensor, *, replicas: int) -> EvalResult:
    """Add up an evaluation (collective); ``replicas`` ranks counted each token."""
    total = loss_sums.clone()
    dist.all_reduce(total)
    loss, tokens, bytes_ = (total / replicas).tolist()
    return EvalResult(loss_sum=loss, tokens=round(tokens), target_bytes=round(bytes_))


def mean_scale(labels: list[Tensor], place: RankPlace, device: torch.device) -> Tensor:
    """Number of positions in the global batch divided by its number of scored labels, from this rank's
    ``_BS`` of a step (collective): a float32 scalar.
    """
    counted = torch.stack([(part_BS >= 0).sum() for part_BS in labels]).sum().to(device, torch.float64)
    positions = sum(part_BS.numel() for part_BS in labels) * place.data_size
    dist.all_reduce(counted)
    replicas = place.world_size // place.data_size  # ranks that brought the same labels
    return (positions * replicas / counted.clamp(min=1)).float()


def params_norm(named: Iterable[tuple[str, nn.Parameter]], device: torch.device) -> float:
    """L2 norm of all trained parameters of the model, each counted once (collective)."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for name, parameter in named:
        another_tells = replica_place(name)[1] != 0 or is_second_copy(name)
        whole_on_each = shard_of(name) is None and tensor_parallel_place(name)[1] != 0
        if parameter.requires_grad and not another_tells and not whole_on_each:
            total += parameter.detach().double().square().sum()
    dist.all_reduce(total)
    return float(total.sqrt())


def whole_shapes(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights of the model by global name, from the parts on each rank (collective)."""
    own = {}
    for name, parameter in matrices(named):
        if replica_place(name)[1] != 0:
            continue  # another rank reports it
        shape, shard = tuple(parameter.shape), shard_of(name)
        own[name] = shape if shard is None else shard.whole_shape(shape)
    of_ranks: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, own)
    return {name: shape for shapes in of_ranks for name, shape in shapes.items()}


@contextlib.contextmanager
def first_bad_gradient(named: Iterable[tuple[str, nn.Parameter]]) -> Iterator[list[str]]:
    """Within this context: the weights whose gradient on this rank, before any sum over ranks, is not
    finite; in order.
    """
    found: list[str] = []

    def noted(name: str) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            if not bool(gradient.isfinite().all()):
                found.append(name)

        return look

    handles = [weight.register_hook(noted(name)) for name, weight in named if weight.requires_grad]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def own_parts(
    place: RankPlace, device: torch.device, losses: tuple[float, float], bad_gradient: str
) -> list[OwnPart]:
    """The results of each rank in a step that was run twice (collective)."""
    own = OwnPart(place.rank, socket.gethostname(), str(device), losses, bad_gradient)
    parts: list[OwnPart] = [own] * place.world_size
    dist.all_gather_object(parts, own)
    return parts


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
    """On all ranks, the text of the first rank that has one (collective; of any length, so only for rare
    events).
    """
    words = [""] * dist.get_world_size()
    dist.all_gather_object(words, word)
    return next((each for each in words if each), "")
