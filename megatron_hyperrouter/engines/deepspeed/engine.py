"""The DeepSpeed engine: data and expert parallelism, ZeRO, pipeline stages."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn

from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.base import Batch, EvalResult, StepResult
from megatron_hyperrouter.engines.deepspeed import checkpoint
from megatron_hyperrouter.engines.deepspeed.launch import join, leave
from megatron_hyperrouter.engines.deepspeed.layers import Sequence, model_layers
from megatron_hyperrouter.engines.deepspeed.moe import moe_spec
from megatron_hyperrouter.engines.deepspeed.names import global_name
from megatron_hyperrouter.engines.deepspeed.optimizer import Clipper, adamw
from megatron_hyperrouter.engines.deepspeed.settings import deepspeed_settings
from megatron_hyperrouter.engines.launch import device
from megatron_hyperrouter.engines.routing import Clock, RouterStatistics, topk_schedule
from megatron_hyperrouter.engines.state import Holding
from megatron_hyperrouter.engines.totals import any_rank, eval_result, step_result
from megatron_hyperrouter.model.init import initialise
from megatron_hyperrouter.model.loss import LanguageModelLoss
from megatron_hyperrouter.model.spec import padded_vocab_size, transformer_config
from megatron_hyperrouter.ops import keyed
from megatron_hyperrouter.routers.base import Router


class DeepSpeedEngine:
    """Serves ``engines.base.Engine``."""

    def __init__(self, config: RunConfig, *, vocab_size: int, for_training: bool) -> None:
        """``vocab_size``: ids of the tokenizer, before padding."""
        self.config = config
        self._found_world = dist.is_initialized()
        self.place = join(config)
        self.device = device()
        self.clock = Clock()
        self.statistics = RouterStatistics(config.model.num_layers, config.model.num_experts)
        self.loss = LanguageModelLoss()
        self.topk_at = topk_schedule(config)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints where it could log
            self.model = self._build(padded_vocab_size(vocab_size, config))
            initialise(self.named_parameters(), config.model, lambda name, shape: keyed.normal(shape, seed=config.train.seed, name=name))
            self.host: Any = self._wrap() if for_training else self._place_without_optimizer()
        self.routers = self._routers()
        for router in self.routers.values():
            router.hold(True)

    # ------------------------------------------------------------------------------------------------ building
    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return self.config.parallel.pipeline_model_parallel_size

    def _build(self, vocab_size: int) -> nn.Module:
        parallel = self.config.parallel
        core = transformer_config(
            self.config,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            # The stages are DeepSpeed's: megatron-core would add an offset of its own to layer numbers (transformer_layer.py:48).
            pipeline_model_parallel_size=1,
        )
        layers = model_layers(self.config, core, moe_spec(self.config, self.clock, self.statistics), vocab_size)
        if self.stages == 1:
            return Sequence(layers, self.loss)
        from deepspeed.pipe import PipelineModule
        from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

        topology = PipeModelDataParallelTopology(num_pp=self.stages, num_mp=1, num_dp=self.place.data_size)
        return PipelineModule(layers, topology=topology, loss_fn=self.loss, partition_method="type:Block")

    def _wrap(self) -> Any:
        import deepspeed

        settings = deepspeed_settings(self.config, data_parallel_size=self.place.data_size)
        self.micro_batches: int = settings["gradient_accumulation_steps"]
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0 / self.micro_batches))
        optimizer = adamw(self.named_parameters(), self.config.optimizer)
        self._clipper = Clipper(optimizer, self.config.optimizer.clip_grad) if self.config.engine.zero_stage == 0 else None
        host, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=settings)
        return host

    def _place_without_optimizer(self) -> None:
        """Evaluation needs DeepSpeed's expert groups, not its engine."""
        for module in self.model.modules():
            if hasattr(module, "set_deepspeed_parallelism"):
                module.set_deepspeed_parallelism()
        self.model.to(self.device, torch.bfloat16 if self.config.train.bf16 else torch.float32)

    # --------------------------------------------------------------------------------------------------- names
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(global name, parameter) of what this rank holds."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield self._global_name(name), parameter

    def _global_name(self, name: str) -> str:
        experts = self.config.model.num_experts // self.config.parallel.expert_model_parallel_size
        first = parallel_state.get_expert_model_parallel_rank() * experts
        return global_name(name, num_layers=self.config.model.num_layers, first_expert=first)

    def _routers(self) -> dict[str, Router]:
        """Prefix of the global names -> router."""
        found = {name: module for name, module in self.model.named_modules() if isinstance(module, Router)}
        return {self._global_name(f"{name}."): router for name, router in found.items()}

    def holding(self) -> Holding:
        """What this rank saves and loads."""
        return Holding(
            named=list(self.named_parameters()),
            routers=self.routers,
            first_dense=self.place.data_rank == 0,
            first_expert=parallel_state.get_expert_data_parallel_rank() == 0,
            first_stage=parallel_state.get_pipeline_model_parallel_rank() == 0,
        )

    # ---------------------------------------------------------------------------------------------------- work
    def train_step(self, batches: Iterator[Batch], *, step: int, learning_rate: float, stop: bool = False) -> StepResult:
        """See :class:`megatron_hyperrouter.engines.base.Engine`."""
        self.clock.step, self.clock.topk, self.statistics.enabled = step, None, True
        for group in self.host.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.stages == 1:
            self._accumulate(batches)
        else:
            self.host.train_batch(batches)
        for router in self.routers.values():
            router.begin_step()
        norm = self._clipper.norm if self._clipper else float(self.host.get_global_grad_norm())
        return step_result(self.loss.take(), self.statistics, grad_norm=norm, stop=stop)

    def _accumulate(self, batches: Iterator[Batch]) -> None:
        self.host.train()
        for _ in range(self.micro_batches):
            tokens_BS, labels_BS = (part.to(self.device, non_blocking=True) for part in next(batches))
            self.host.backward(self.host(tokens_BS, labels_BS))
            self.host.step()

    def evaluate(self, batches: Iterator[Batch], *, topk: int, token_bytes_V: Tensor | None = None) -> EvalResult:
        """See :class:`megatron_hyperrouter.engines.base.Engine`."""
        self.clock.topk, self.statistics.enabled = topk, False
        self.loss.token_bytes_V = None if token_bytes_V is None else token_bytes_V.to(self.device)
        was_training = self.model.training
        self.model.eval()
        try:
            self._forward_all(batches)
        finally:
            self.model.train(was_training)
            self.clock.topk, self.statistics.enabled, self.loss.token_bytes_V = None, True, None
        return eval_result(self.loss.take(), replicas=self.config.parallel.tensor_model_parallel_size)

    @torch.no_grad()
    def _forward_all(self, batches: Iterator[Batch]) -> None:
        if self.stages == 1:
            for tokens_BS, labels_BS in batches:
                self.model(tokens_BS.to(self.device), labels_BS.to(self.device))
            return
        held = list(batches)
        self.host.eval_batch(iter(held), num_micro_batches=len(held))

    # ---------------------------------------------------------------------------------------------- checkpoints
    def save(self, folder: Path) -> None:
        """See :class:`megatron_hyperrouter.engines.base.Engine`."""
        checkpoint.save(self, folder)

    def load(self, folder: Path, *, weights_only: bool = False) -> None:
        """See :class:`megatron_hyperrouter.engines.base.Engine`."""
        checkpoint.load(self, folder, weights_only=weights_only)
        for router in self.routers.values():
            router.begin_step()

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()

    def any_rank(self, flag: bool) -> bool:
        """True on all ranks when ``flag`` is true on one."""
        return any_rank(flag, self.device)

    def close(self) -> None:
        """Leave the process groups; those that stood before this engine stay."""
        leave(keep_world=self._found_world)
