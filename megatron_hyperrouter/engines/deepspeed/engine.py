"""The DeepSpeed engine: data and expert parallelism, ZeRO, pipeline stages."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import nn

from megatron_hyperrouter.engines.deepspeed import host_state, model, tensor
from megatron_hyperrouter.engines.deepspeed.groups import join, leave
from megatron_hyperrouter.engines.deepspeed.optimizer import Clipper, adamw
from megatron_hyperrouter.engines.deepspeed.settings import deepspeed_settings, refusals, zero_stage
from megatron_hyperrouter.engines.routing import draw_by_name
from megatron_hyperrouter.engines.saved.pieces import Holding
from megatron_hyperrouter.engines.shared import SharedEngine
from megatron_hyperrouter.model.init import initialise

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.engines.base import Batch
    from megatron_hyperrouter.model.classifier import Classifier


class DeepSpeedEngine(SharedEngine):
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
        """``vocab_size``: number of token ids, before padding; ``eod``: the id that ends a document;
        ``classifier``: replaces the output matrix.
        """
        self._found_world = dist.is_initialized()
        super().__init__(config, join(config), eod=eod, classifier=classifier)
        self.stages = config.parallel.pipeline_model_parallel_size
        self._zero_stage = zero_stage(config, world_size=self.place.world_size)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints where it could log
            self.model = model.build(
                config,
                vocab_size=vocab_size,
                clock=self.clock,
                statistics=self.statistics,
                loss=self.loss,
                classifier=classifier,
            )
            initialise(self.named_parameters(), config.model, draw_by_name(config.train.seed))
            # DeepSpeed's engine alone runs pipeline stages, in an evaluation too.
            self.host: Any = None
            if for_training or self.stages > 1:
                self.host = self._wrap()
            else:
                self._place_without_optimizer()
        self.hold_routers(model.routers(self.model, config))

    def _wrap(self) -> Any:
        import deepspeed

        optimizer = adamw(
            self.named_parameters(),
            self.config.optimizer,
            router_lr_mult=self.config.router.options.lr_mult,
            stand_in=getattr(self.model, model.STAND_IN, None),
        )
        groups = [sum(parameter.numel() for parameter in group["params"]) for group in optimizer.param_groups]
        settings = deepspeed_settings(
            self.config,
            data_parallel_size=self.place.data_size,
            largest_group=max(groups),
            stage=self._zero_stage,
        )
        self._scale_router_losses(settings["gradient_accumulation_steps"])
        self._clipper = Clipper(optimizer, self.config.optimizer.clip_grad) if self._zero_stage == 0 else None
        optimizer.register_step_pre_hook(self._judge)
        spread = self.config.parallel.tensor_model_parallel_size > 1
        if spread:
            latent = self.config.attention.multi_latent_attention
            tensor.sum_partial_gradients(self.named_parameters(), latent=latent)
        # A PipelineModule brings its own topology.
        mpu = tensor.ModelParallelUnit() if spread and self.stages == 1 else None
        with refusals(self.config.engine.deepspeed_config):
            host, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=settings, mpu=mpu)
        if self._zero_stage == 0 and self.place.world_size == 1:
            host.enable_backward_allreduce = False  # it would copy each gradient twice and sum nothing
        return host

    def _place_without_optimizer(self) -> None:
        """Evaluation needs DeepSpeed's expert groups, not its engine."""
        for module in self.model.modules():
            if hasattr(module, "set_deepspeed_parallelism"):
                cast(Any, module).set_deepspeed_parallelism()
        self.model.to(self.device, torch.bfloat16 if self.config.train.bf16 else torch.float32)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(global name, parameter) of each parameter on this rank."""
        return model.named_parameters(self.model, self.config)

    def modules(self) -> list[nn.Module]:
        """The whole model."""
        return [self.model]

    def optimize(self, batches: list[Batch], learning_rate: float) -> float:
        """See :class:`SharedEngine`."""
        for group in self.host.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_mult", 1.0)  # none in old checkpoints
        self._accumulate(len(batches))
        if self.stages == 1:
            self.host.train()
            for batch in batches:
                tokens_BS, labels_BS = (part.to(self.device, non_blocking=True) for part in batch)
                self.host.backward(self.host(self.arrive(tokens_BS), labels_BS))
                self.host.step()
        else:
            self.host.train_batch(iter(self._with_known_tokens(batches)))
        return self._norm()

    def _accumulate(self, micro_batches: int) -> None:
        """Set the number of micro-batches per step from now on, because the batch may grow."""
        if micro_batches == self.host.gradient_accumulation_steps():
            return
        self.host.set_train_batch_size(
            micro_batches * self.config.train.micro_batch_size * self.place.data_size
        )
        self.host.micro_steps = 0  # DeepSpeed steps where it is a multiple of the accumulation steps
        self._scale_router_losses(micro_batches)

    def _scale_router_losses(self, micro_batches: int) -> None:
        """Of the shape that the Megatron engine sets; their gradient is multiplied by it on the GPU."""
        MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), 1.0 / micro_batches, device=self.device))

    def _judge(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Called before AdamW: without gradients, it does not change weights and moments.

        ZeRO calls it for one parameter group after the other; the norm of all groups is then known.
        """
        if not self.judgement.allows(self._norm()):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def _norm(self) -> float:
        """The gradient norm before clipping."""
        return self._clipper.norm if self._clipper else float(self.host.optimizer._global_grad_norm)

    @torch.no_grad()
    def forward_all(self, batches: Iterator[Batch]) -> None:
        """See :class:`SharedEngine`."""
        for held in self.in_parts(batches):
            if self.stages > 1:
                self.host.eval_batch(iter(self._with_known_tokens(held)), num_micro_batches=len(held))
                continue
            for batch in held:
                tokens_BS, labels_BS = (part.to(self.device, non_blocking=True) for part in batch)
                self.model(self.arrive(tokens_BS), labels_BS)

    def _with_known_tokens(self, held: list[Batch]) -> list[Batch]:
        """The same tokens; the layers of every stage then know them. DeepSpeed gives them only to the first
        and the last stage.
        """
        return [
            (self.arrive(tokens_BS.to(self.device, non_blocking=True)), labels_BS)
            for tokens_BS, labels_BS in held
        ]

    def holding(self) -> Holding:
        """See :class:`SharedEngine`."""
        named, host = self.named, self.host
        return Holding(
            named=named,
            routers=self.routers,
            pieces=None if host is None else lambda: host_state.pieces(host.optimizer, named),
            spread=self._zero_stage > 0,
            device=self.device,
        )

    def take_weights_over(self) -> None:
        """See :class:`SharedEngine`."""
        if self.host is not None:
            host_state.take_weights_over(self.host.optimizer)

    def load_format_1(self, state: Any) -> None:
        """See :class:`SharedEngine`."""
        host_state.load_format_1(self.host.optimizer, state)

    def close(self) -> None:
        """Leave the process groups, except those that existed before this engine."""
        self.profiler.close()
        leave(keep_world=self._found_world)
