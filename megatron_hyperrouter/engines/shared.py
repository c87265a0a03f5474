"""What the engines of both hosts share: the clock, the statistics, and everything that does not depend on
the host.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_hyperrouter.engines.clock import Clock
from megatron_hyperrouter.engines.profile import Profiler, StepTimes
from megatron_hyperrouter.engines.routing import topk_schedule
from megatron_hyperrouter.engines.saved.engine import SavedEngine
from megatron_hyperrouter.engines.statistics import Likeness, RouterStatistics
from megatron_hyperrouter.engines.totals import (
    Judgement,
    any_rank,
    eval_result,
    first_bad_gradient,
    first_word,
    largest,
    mean_scale,
    own_parts,
    params_norm,
    step_result,
    whole_shapes,
)
from megatron_hyperrouter.engines.world import (
    device,
    first_expert,
    patience,
    peak_memory,
    random_states,
    set_random_states,
    wait_at_most,
)
from megatron_hyperrouter.model.loss import (
    UNCOUNTED,
    ClassLoss,
    LanguageModelLoss,
    captured_logits,
    whole_logits,
)

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.engines.base import Batch, EvalResult, OwnPart, RankPlace, StepResult
    from megatron_hyperrouter.model.classifier import Classifier
    from megatron_hyperrouter.routers.base import Router


_EVALUATED_TOGETHER = 16  # micro-batches for each pipeline stage


class _Step(NamedTuple):
    """What is needed to run a step again."""

    batches: list[Batch]  # of this rank
    step: int
    learning_rate: float
    random: dict[str, Any]
    detailed: bool = True


class SharedEngine(SavedEngine):
    """Implements the parts of ``engines.base.Engine`` that do not depend on the host."""

    routers: dict[str, Router]  # prefix of the global names -> router
    num_zeros: float | None = None  # of the last step's gradient, where the host counts them

    def __init__(
        self,
        config: RunConfig,
        place: RankPlace,
        *,
        eod: int | None = None,
        classifier: Classifier | None = None,
    ) -> None:
        """Needs the process groups; ``eod``: the id that ends a document, if the settings separate
        documents.
        """
        super().__init__()
        self.config = config
        self.place = place
        self.device = device()
        self.patience = patience()
        self.eod = eod
        resets = config.data.reset_attention_mask or config.data.reset_position_ids
        balanced = config.model.moe_router_force_load_balancing
        self.classifier = classifier
        padded = classifier is not None
        self.clock = Clock(eod=eod if resets else None, balanced=balanced, padded=padded)
        self.statistics = RouterStatistics(
            config.model.num_layers + (config.model.mtp_num_layers or 0), config.model.num_experts
        )
        self.loss = LanguageModelLoss(self.device) if classifier is None else ClassLoss(self.device)
        self.topk_at = topk_schedule(config)
        self.profiler = Profiler(config.logging, place.rank)
        self.judgement = Judgement()
        self._last: _Step | None = None
        self._times = StepTimes(config, self.device)
        self._own_loss = 0.0  # of this rank's micro-batches in the last step

    def hold_routers(self, routers: dict[str, Router]) -> None:
        """Keep the routers of this rank, and promise to notify them when their weights change."""
        self.routers = routers
        for router in routers.values():
            router.hold(True)
        # A pipeline stage that has only dense layers has no router, but its sums have the same size.
        extra = max((router.num_extra_counts for router in routers.values()), default=0)
        self.statistics.make_room(largest(extra, self.device))

    # ----------------------------------------------------------------------------------------------------
    # work
    def train_step(
        self,
        batches: Iterator[Batch],
        *,
        step: int,
        learning_rate: float,
        stop: Callable[[], int] = lambda: False,
        accept: Callable[[StepResult], bool] = lambda result: True,
        detailed: bool = True,
    ) -> StepResult:
        """See :class:`megatron_hyperrouter.engines.base.Engine`."""
        held = self._times.fetched(batches)
        self._last = _Step(held, step, learning_rate, random_states(), detailed)
        result = self._run(self._last, stop, accept)
        if not result.applied:
            set_random_states(self._last.random)
        return result

    def again(self) -> tuple[StepResult, list[OwnPart]]:
        """See :class:`megatron_hyperrouter.engines.base.Engine`."""
        assert self._last is not None, "call step() before again()"
        first = self._own_loss
        # the ranks that divide a hypernetwork add up the gradients of its embedding in the backward pass
        divided = [router for router in self.routers.values() if router.facts.data_ranks is not None]
        summed = {id(weight) for router in divided for weight in router.parameters()}
        own = [(name, weight) for name, weight in self.holding().named if id(weight) not in summed]
        with first_bad_gradient(own) as bad:
            result = self._run(self._last, lambda: False, lambda result: False)
        set_random_states(self._last.random)
        losses = (first, self._own_loss)
        return result, own_parts(self.place, self.device, losses, "".join(bad[:1]))

    def leave_out(self, step: int, stop: Callable[[], int]) -> bool:
        """See :class:`megatron_hyperrouter.engines.base.Engine`."""
        self.clock.step = step + 1
        return self.any_rank(bool(stop()))

    def _run(self, now: _Step, stop: Callable[[], int], accept: Callable[[StepResult], bool]) -> StepResult:
        """Run one step; all ranks know its loss and norm before the optimizer changes anything."""
        self.clock.begin(step=now.step)
        self._times.begin(self.modules())
        self.statistics.enabled, self.statistics.detailed = True, now.detailed
        batches = now.batches
        if self.config.data.eod_mask_loss:
            batches = [self._counted(batch) for batch in batches]
            self.loss.scale = mean_scale([labels_BS for _, labels_BS in batches], self.place, self.device)
        found: list[tuple[StepResult, Tensor]] = []

        def decide(norm: float) -> bool:
            own = self.loss.take()
            self._own_loss = float(own[0])
            found.append(
                step_result(
                    own,
                    self.statistics,
                    self.place,
                    grad_norm=norm,
                    stop=stop(),
                    memory=peak_memory(self.device),
                    times=self._times.take(),
                )
            )
            return accept(found[0][0])

        self.judgement.begin(decide)
        for router in self.routers.values():
            router.begin_backward(len(batches))
        with self.profiler.watching(now.step + 1):
            norm = self.optimize(batches, now.learning_rate)
        for router in self.routers.values():
            router.end_backward()
        # some hosts skip a step on their own, without calling the judgement
        applied = self.judgement.allows(norm)
        result, sums = found[0]
        if applied:
            self._end_step(now.step, sums)
        if self.config.logging.log_params_norm:
            result = replace(result, params_norm=params_norm(self.holding().named, self.device))
        if self.num_zeros is not None:
            result = replace(result, num_zeros=int(self.num_zeros))
        self.clock.step = now.step + 1  # an evaluation may follow
        return replace(result, applied=applied)

    def _end_step(self, step: int, sums: Tensor) -> None:
        parallel = self.config.parallel
        # Tensor-parallel ranks route the same tokens unless the positions are divided among them.
        shared_out = parallel.sequence_parallel and self.config.engine.engine == "megatron"
        replicas = 1 if shared_out else parallel.tensor_model_parallel_size
        tokens = round(float(self.statistics.tokens_L(sums).max()) / replicas)
        frozen = self.classifier is not None and "router" in self.classifier.freeze
        for router in () if frozen else self.routers.values():
            router.end_step(
                self.statistics.counts(
                    sums, router.layer_number, step=step + 1, tokens=tokens, replicas=replicas
                )
            )
        self.weights_changed()

    @abstractmethod
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(global name, parameter) of each parameter on this rank."""

    @cached_property
    def named(self) -> list[tuple[str, nn.Parameter]]:
        """:meth:`named_parameters`, found once: training waits for each save."""
        return list(self.named_parameters())

    @abstractmethod
    def optimize(self, batches: list[Batch], learning_rate: float) -> float:
        """One optimizer step over all of this rank's micro-batches; weights change only if
        ``self.judgement`` allows it.  Returns the gradient norm before clipping.
        """

    def evaluate(
        self, batches: Iterator[Batch], *, topk: int, token_bytes_V: Tensor | None = None
    ) -> EvalResult:
        """See :class:`megatron_hyperrouter.engines.base.Engine`."""
        self.clock.begin(step=self.clock.step, topk=topk)
        self.statistics.enabled = False
        self.loss.token_bytes_V = None if token_bytes_V is None else token_bytes_V.to(self.device)
        modules = self.modules()
        were_training = [module.training for module in modules]
        for module in modules:
            module.eval()
        try:
            self.forward_all(map(self._counted, batches))
        finally:
            for module, training in zip(modules, were_training, strict=True):
                module.train(training)
            self.clock.topk, self.statistics.enabled, self.loss.token_bytes_V = None, True, None
        return eval_result(self.loss.take(), replicas=self.config.parallel.tensor_model_parallel_size)

    def logits(self, tokens_BS: Tensor, *, topk: int) -> Tensor:
        """See :class:`megatron_hyperrouter.engines.base.Engine`."""
        parallel = self.config.parallel
        if parallel.context_parallel_size > 1:
            raise NotImplementedError(
                "logits are not available with context parallelism, which splits sequences"
            )
        stages, rows = parallel.pipeline_model_parallel_size, len(tokens_BS)
        size = self.config.train.micro_batch_size if stages > 1 else rows  # stages know no other size
        more = tokens_BS[-1:].expand(-rows % size, -1)
        parts = torch.cat((tokens_BS, more)).split(size)
        self.clock.dropless = True
        try:
            with captured_logits(self.modules()) as seen:
                self.evaluate(iter([(part, part) for part in parts]), topk=topk)
        finally:
            self.clock.dropless = False
        whole_BSV = whole_logits(seen, tensor_size=parallel.tensor_model_parallel_size, stages=stages)
        return whole_BSV[:rows]

    def expert_similarity(self, tokens_BS: Tensor, *, topk: int) -> dict[int, float]:
        """See :class:`megatron_hyperrouter.engines.base.Engine`."""
        likeness = Likeness(self.config, self.device, first_expert=first_expert(self.config))
        with likeness.watching(self.routers.values()):
            self.evaluate(iter([(tokens_BS, tokens_BS)]), topk=topk)
        return likeness.by_layer()

    @abstractmethod
    def forward_all(self, batches: Iterator[Batch]) -> None:
        """Only forward passes; the loss counts its tokens."""

    def arrive(self, tokens_BS: Tensor, part: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Announce the next micro-batch to the layers; returns the ids for the embedding, which has no row
        for padding.
        """
        self.clock.arrive(tokens_BS, self.place, part)
        return tokens_BS.clamp(min=0) if self.clock.padded else tokens_BS

    def _counted(self, batch: Batch) -> Batch:
        """The same batch, without labels that are excluded from the loss."""
        tokens_BS, labels_BS = batch
        if not self.config.data.eod_mask_loss or self.eod is None:
            return batch
        return tokens_BS, labels_BS.masked_fill(tokens_BS.eq(self.eod), UNCOUNTED)

    def in_parts(self, batches: Iterator[Batch], *, groups_of: int = 1) -> Iterator[list[Batch]]:
        """An evaluation's micro-batches, a few at a time, because the clock and some hosts keep all of
        them in memory.  The last group of ``groups_of`` is filled up without labels that count.
        """
        size = _EVALUATED_TOGETHER * self.config.parallel.pipeline_model_parallel_size
        while part := list(islice(batches, size)):
            self.clock.begin(step=self.clock.step, topk=self.clock.topk)
            tokens_BS, labels_BS = part[-1]
            more = (tokens_BS, torch.full_like(labels_BS, UNCOUNTED))
            yield part + [more] * (-len(part) % groups_of)

    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """The model, or its chunks on this rank."""

    def go_to(self, step: int) -> None:
        """See :class:`SavedEngine`."""
        self.clock.step = step

    def weights_changed(self) -> None:
        """See :class:`SavedEngine`."""
        for router in self.routers.values():
            router.begin_step()

    def set_aux_loss_coeff(self, value: float) -> None:
        """See :class:`megatron_hyperrouter.engines.base.Engine`."""
        for router in self.routers.values():
            router.aux_loss_coeff = value

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See :class:`megatron_hyperrouter.engines.base.Engine`."""
        return whole_shapes(self.holding().named)

    def wait_at_most(self, seconds: float) -> None:
        """See :class:`megatron_hyperrouter.engines.base.Engine`."""
        wait_at_most(seconds)

    def any_rank(self, flag: bool) -> bool:
        """True on all ranks when ``flag`` is true on one."""
        return any_rank(flag, self.device)

    def first_word(self, word: str) -> str:
        """On all ranks, the word of the first rank that has one."""
        return first_word(word)
