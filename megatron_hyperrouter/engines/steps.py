"""Optimizer steps for routers in your own model: gives them what our engines give to their routers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_hyperrouter.engines.base import RankPlace
from megatron_hyperrouter.engines.clock import Clock, RouterSite
from megatron_hyperrouter.engines.statistics import RouterStatistics
from megatron_hyperrouter.engines.world import device
from megatron_hyperrouter.routers.base import Router


class RouterSteps:
    """Tells the routers of a model the step and the tokens, and sums their choices over all ranks.

    First put routers into the model, with ``plug_into_deepspeed`` or ``megatron_router_builder``.  Then
    create this object on every rank, and use it in the training loop:

        steps = RouterSteps(model, batch_first=True)
        for step in range(train_iters):
            steps.begin(step)
            for tokens_BS, labels_BS in micro_batches:
                steps.arrive(tokens_BS)
                loss(model(tokens_BS), labels_BS).backward()
            optimizer.step()
            chosen = steps.end()  # {"entropy": [...], "load_max_over_mean": [...], ...}, one number per layer

    Without this object, and if you do not set ``clock.step`` of the routers, they always see step 0.

    - ``begin`` gives the routers the step, for a k that grows and for routers with stages or schedules.
    - ``arrive`` is needed by ``stablemoe``, by ``simsmoe`` if several ranks share a micro-batch (sequence or
      context parallelism), and by the options ``jitter_eps`` and ``aux_loss="sequence"``.
    - ``end`` is needed by ``simsmoe``, and by the options ``expert_bias`` and ``aux_loss="global_batch"``.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[nn.Module],
        *,
        batch_first: bool,
        part: Callable[[Tensor], Tensor] | None = None,
        group: dist.ProcessGroup | None = None,
        replicas: int = 1,
        data_rank: int | None = None,
        data_size: int | None = None,
    ) -> None:
        """Find the routers in the model.

        Args:
            model: the model of this rank, or an iterable of its parts.
            batch_first: True if hidden states have the shape ``[B, S, D]``; False if they have the shape
                ``[S, B, D]``, as in megatron-core.
            part: with sequence or context parallelism, a function that selects from a ``[B, S]`` tensor the
                positions that the routers of this rank process.
            group: process group with all ranks of the model; by default all processes.
            replicas: number of ranks that route the same tokens.  Without sequence parallelism, this is the
                number of tensor-parallel ranks.
            data_rank: number of this rank among the ranks that read different samples; by default its rank
                in ``group``.
            data_size: number of ranks that read different samples; by default the size of ``group``.

        Raises:
            ValueError: the model has no router, two layers have the same number, or layers have different
                numbers of experts.
        """
        parts = [model] if isinstance(model, nn.Module) else list(model)
        found = (getattr(module, "site", None) for each in parts for module in each.modules())
        sites = [site for site in found if isinstance(site, RouterSite)]
        self.routers: list[Router] = [site.router for site in sites]
        self._group, self._replicas = group, replicas
        rank, size = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
        self._alone = size == 1
        self._batch_first, self._part = batch_first, part
        self._place = RankPlace(
            rank, size, rank if data_rank is None else data_rank, size if data_size is None else data_size
        )
        self.clock = Clock()
        self._statistics = RouterStatistics(*self._sizes())
        self._statistics.make_room(
            self._largest(max((router.num_extra_counts for router in self.routers), default=0))
        )
        self._statistics.enabled = False
        for site in sites:
            site.join(self.clock, self._statistics)

    def begin(self, step: int) -> None:
        """Begin a training step.  Call this before the step's first forward pass.

        Args:
            step: number of optimizer steps completed so far.
        """
        self.clock.begin(step=step)
        self._statistics.enabled = True

    def begin_evaluation(self, topk: int | None = None) -> None:
        """Begin an evaluation.  Pass its tokens with ``arrive``, as in training.  Choices are not counted, so
        an evaluation has no ``end``.  Call ``begin`` before the next training pass.

        Args:
            topk: number of experts for each token; by default the k of the schedule.
        """
        self.clock.begin(step=self.clock.step, topk=topk)
        self._statistics.enabled = False

    def arrive(self, tokens_BS: Tensor) -> None:
        """Pass the token ids of a micro-batch, before its forward pass.  Do this for every micro-batch or for
        none.

        Args:
            tokens_BS: int64 token ids of the shape ``[B, S]``.
        """
        self.clock.arrive(tokens_BS, self._place, self._part, batch_first=self._batch_first)

    def end(self) -> dict[str, list[float]]:
        """End a training step.  Call this on every rank, after ``optimizer.step()``: the routers get the sums
        of the choices of all ranks.

        Returns:
            For each name, a list with one number for each layer: ``entropy`` of the router (in nats),
                ``load_max_over_mean`` (largest load of an expert divided by the mean load), and the losses
                ``aux`` and ``z`` before they are multiplied by their coefficients.  The number is nan for a
                layer that has no router of this project, or that processed no token.
        """
        self._statistics.enabled = False
        sums = self._statistics.take().to(device())
        if not self._alone:
            dist.all_reduce(sums, group=self._group)
        sums = sums.cpu()
        self.clock.step += 1
        tokens_L = (self._statistics.tokens_L(sums) / self._replicas).tolist()
        tokens = round(max(tokens_L))
        if not tokens:
            raise ValueError("no router has processed a token since begin()")
        for router in self.routers:
            if tokens_L[router.layer_number - 1]:  # a model may leave layers out
                counts = self._statistics.counts(
                    sums, router.layer_number, step=self.clock.step, tokens=tokens, replicas=self._replicas
                )
                router.end_step(counts)
            router.begin_step()
        return {
            name: self._for_all_layers(values, sums)
            for name, values in self._statistics.summary(sums).items()
        }

    def _for_all_layers(self, values: list[float], sums: Tensor) -> list[float]:
        """A number for each layer: nan if it saw no token."""
        routed = iter(values)
        seen = self._statistics.tokens_L(sums).tolist()
        return [next(routed) if tokens else float("nan") for tokens in seen]

    def _sizes(self) -> tuple[int, int]:
        """Layers of the whole model, and experts of each."""
        numbers = [router.layer_number for router in self.routers]
        if len(set(numbers)) < len(numbers):
            raise ValueError(
                f"several routers have the same layer_number: {sorted(numbers)}; give each router a "
                "different one"
            )
        experts = {router.num_experts for router in self.routers}
        most = self._largest(max(experts, default=0))
        if not most:
            raise ValueError(
                "the model has no router of this package; plug routers in before you create RouterSteps"
            )
        if experts - {most}:
            raise ValueError(
                f"layers have different numbers of experts, {sorted(experts)}; create "
                "one RouterSteps for each kind of layer"
            )
        return self._largest(max(numbers, default=0)), most

    def _largest(self, number: int) -> int:
        """The largest over all ranks; some of them may have no layer with experts."""
        if self._alone:
            return number
        found = torch.tensor([number], device=device())
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
        return int(found)
