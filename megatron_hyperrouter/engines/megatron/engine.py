"""The Megatron engine: tensor, sequence, pipeline, context, expert and expert-tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_hyperrouter.engines.base import RankPlace
from megatron_hyperrouter.engines.megatron import data_parallel, host_state, model
from megatron_hyperrouter.engines.routing import draw_by_name
from megatron_hyperrouter.engines.saved.pieces import Holding
from megatron_hyperrouter.engines.shared import SharedEngine
from megatron_hyperrouter.engines.world import backend, join_world, single_rank_without_launcher
from megatron_hyperrouter.model.init import initialise
from megatron_hyperrouter.model.parallel import forget_groups, make_groups, seed_dropout

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.engines.base import Batch
    from megatron_hyperrouter.model.classifier import Classifier


class MegatronEngine(SharedEngine):
    """Implements ``engines.base.Engine``."""

    def __init__(
        self,
        config: RunConfig,
        *,
        vocab_size: int,
        eod: int | None = None,
        for_training: bool = True,
        classifier: Classifier | None = None,
    ) -> None:
        """``vocab_size``: ids of the tokenizer, before padding; ``eod``: the id that ends a document;
        ``classifier``: replaces the output matrix.
        """
        self._found_world = dist.is_initialized()
        super().__init__(config, _join(config), eod=eod, classifier=classifier)
        self.core: TransformerConfig = model.core_config(config)
        self.chunks = model.build(
            config,
            self.core,
            vocab_size=vocab_size,
            clock=self.clock,
            statistics=self.statistics,
            loss=self.loss,
            classifier=classifier,
        )
        initialise(self.named_parameters(), config.model, draw_by_name(config.train.seed))
        for chunk in self.chunks:
            chunk.to(self.device)
        wrapped = [Float16Module(self.core, chunk) if config.train.bf16 else chunk for chunk in self.chunks]
        self.optimizer: Any = None
        self.wrapped: list[nn.Module] = self._for_training(wrapped) if for_training else wrapped
        self.hold_routers(model.routers(self.chunks, config))
        self._forward_backward = get_forward_backward_func()

    def _for_training(self, chunks: list[nn.Module]) -> list[nn.Module]:
        wrapped = data_parallel.wrapped(self.config, self.core, chunks, world_size=self.place.world_size)
        self.optimizer = data_parallel.optimizer(self.config, self.core, wrapped, self.judgement)
        self.core.finalize_model_grads_func = finalize_model_grads
        self.core.grad_scale_func = self.optimizer.scale_loss
        if wrapped[0].ddp_config.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in wrapped]
            self.core.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        return list(wrapped)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(global name, parameter) of each parameter on this rank."""
        return model.named_parameters(self.chunks, self.config)

    def modules(self) -> list[nn.Module]:
        """The chunks, wrapped."""
        return self.wrapped

    # ----------------------------------------------------------------------------------------------------
    # work
    def optimize(self, batches: list[Batch], learning_rate: float) -> float:
        """See :class:`SharedEngine`."""
        for chunk in self.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_mult"]
        model.set_topk(self.chunks, self.topk_at(self.clock.step))
        self._schedule(batches, forward_only=False)
        _, norm, self.num_zeros = self.optimizer.step()
        return float(norm)

    def forward_all(self, batches: Iterator[Batch]) -> None:
        """See :class:`SharedEngine`."""
        model.set_topk(self.chunks, self.clock.topk or self.config.model.moe_router_topk)
        # the interleaved schedule takes only whole groups, of as many micro-batches as there are stages
        stages = self.config.parallel.pipeline_model_parallel_size if len(self.wrapped) > 1 else 1
        with torch.no_grad():
            for held in self.in_parts(batches, groups_of=stages):
                self._schedule(held, forward_only=True)

    def _schedule(self, batches: list[Batch], *, forward_only: bool) -> None:
        held = [self._on_this_rank(batch) for batch in batches]
        iterators = [iter(held) for _ in self.wrapped]  # each chunk reads from a separate iterator
        several = len(self.wrapped) > 1
        self._forward_backward(
            forward_step_func=self._forward_step,
            data_iterator=iterators if several else iterators[0],
            model=self.wrapped if several else self.wrapped[0],
            num_microbatches=len(held),
            seq_length=self.config.model.seq_length,
            micro_batch_size=batches[0][0].size(0),
            decoder_seq_length=self.config.model.seq_length,
            forward_only=forward_only,
        )

    def _forward_step(self, iterator: Iterator[Batch], chunk: nn.Module) -> tuple[Tensor, Any]:
        tokens_BS, labels_BS = next(iterator)
        more = {}
        if self.core.mtp_num_layers is not None:  # multi-token prediction shifts these by itself
            positions_S = torch.arange(tokens_BS.size(1), device=tokens_BS.device)
            more = {"position_ids": positions_S.expand_as(tokens_BS), "loss_mask": (labels_BS >= 0).float()}
        output = chunk(tokens_BS, more.pop("position_ids", None), None, labels=labels_BS, **more)

        def loss_of(mean: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            # The schedule multiplies by the context-parallel size, and DDP averages over it: a mean of equal
            # parts is the mean.
            return mean / self.config.parallel.context_parallel_size, {}

        return output, loss_of

    def _on_this_rank(self, batch: Batch) -> Batch:
        """The part of a micro-batch that this rank computes with; its layers know the tokens now, on every
        pipeline stage.
        """
        tokens_BS, labels_BS = (part.to(self.device, non_blocking=True) for part in batch)
        tokens_BS = self.arrive(tokens_BS, self._routed_part)
        return self._slices(tokens_BS), self._slices(labels_BS)

    def _slices(self, whole_BS: Tensor) -> Tensor:
        """The slices of the sequence that this context-parallel rank has: one from either end, so that all
        have equal work.
        """
        size = self.config.parallel.context_parallel_size
        return (
            whole_BS if size == 1 else _two_slices(whole_BS, parallel_state.get_context_parallel_rank(), size)
        )

    def _routed_part(self, whole_BS: Tensor) -> Tensor:
        """The positions whose vectors reach this rank's routers; sequence parallelism splits them once
        more.
        """
        own_BS = self._slices(whole_BS)
        parallel = self.config.parallel
        if not parallel.sequence_parallel:
            return own_BS
        return own_BS.chunk(parallel.tensor_model_parallel_size, dim=1)[
            parallel_state.get_tensor_model_parallel_rank()
        ]

    # ----------------------------------------------------------------------------------------------
    # checkpoints
    def holding(self) -> Holding:
        """See :class:`SharedEngine`."""
        if self.optimizer is not None:
            data_parallel.gather_weights(self.wrapped)
        named, optimizer = self.named, self.optimizer
        return Holding(
            named=named,
            routers=self.routers,
            pieces=None if optimizer is None else lambda: host_state.pieces(optimizer, named),
            spread=self.config.optimizer.use_distributed_optimizer,
            device=self.device,
        )

    def take_weights_over(self) -> None:
        """See :class:`SharedEngine`."""
        if self.optimizer is not None:
            self.optimizer.reload_model_params()

    def load_format_1(self, state: Any) -> None:
        """See :class:`SharedEngine`."""
        host_state.load_format_1(self.optimizer, state, layers=self.config.engine.transformer_impl)

    def close(self) -> None:
        """Leave the process groups, except those that existed before this engine."""
        self.profiler.close()
        forget_groups()
        if not self._found_world and dist.is_initialized():
            dist.destroy_process_group()


def _join(config: RunConfig) -> RankPlace:
    single_rank_without_launcher()
    host_backend = backend()
    if not dist.is_initialized():
        join_world(host_backend)
    make_groups(config)
    seed_dropout(config)
    return RankPlace(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def _two_slices(whole_BS: Tensor, rank: int, size: int) -> Tensor:
    slices = whole_BS.chunk(2 * size, dim=1)
    return torch.cat([slices[rank], slices[2 * size - 1 - rank]], dim=1).contiguous()
