"""megatron-core's data parallelism: buffers of gradients, communication that overlaps, and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_hyperrouter.config.derived import overlap
from megatron_hyperrouter.engines.megatron.judged import JudgedOptimizer
from megatron_hyperrouter.engines.totals import Judgement

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig


def wrapped(
    run: RunConfig, core: TransformerConfig, chunks: list[nn.Module], *, world_size: int
) -> list[DistributedDataParallel]:
    """The chunks of the model, each with buffers for its gradients."""
    settings, overlaps = run.optimizer, overlap(run, world_size)
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=settings.use_distributed_optimizer,
        grad_reduce_in_fp32=not settings.grad_reduce_in_bf16,
        overlap_grad_reduce=overlaps.gradients,
        overlap_param_gather=overlaps.weights,
        bucket_size=settings.ddp_bucket_size,
    )
    return [
        DistributedDataParallel(core, config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]


def optimizer(
    run: RunConfig, core: TransformerConfig, chunks: list[DistributedDataParallel], judgement: Judgement
) -> JudgedOptimizer:
    """AdamW over the chunks of :func:`wrapped`."""
    config = _optimizer_config(run, core, gathers=chunks[0].ddp_config.overlap_param_gather)
    made = get_megatron_optimizer(
        config, chunks, _overrides(config, run.router.options.lr_mult), use_gloo_process_groups=False
    )
    judged = JudgedOptimizer(made, judgement)
    # megatron-core's scheduler would multiply by wd_mult; this program has its own schedule, and without
    # this line norms would decay
    for group in judged.param_groups:
        group["weight_decay"] = run.optimizer.weight_decay * group["wd_mult"]
        if "fused" in group:  # torch's own AdamW, where apex and Transformer Engine are missing
            group["fused"], group["foreach"] = True, False
    return judged


def gather_weights(chunks: Iterable[Any]) -> None:
    """Make the weights of the last step whole on each rank (collective): where their gathering overlaps,
    they are sharded until the next forward pass.

    Weights that are whole stay as they are: what a rank has may be compared with the other ranks.
    """
    for chunk in chunks:
        if not chunk.ddp_config.overlap_param_gather:
            continue
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            if not group.param_gather_dispatched or group.param_gather_handle is not None:
                group.start_param_sync(force_sync=True)


def _optimizer_config(run: RunConfig, core: TransformerConfig, *, gathers: bool) -> OptimizerConfig:
    settings = run.optimizer
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        clip_grad=settings.clip_grad or math.inf,  # 0 would leave out the norm as well
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        bf16=run.train.bf16,
        params_dtype=core.params_dtype,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        log_num_zeros_in_grad=run.logging.log_num_zeros_in_grad,
        overlap_param_gather=gathers,
    )


def _overrides(settings: OptimizerConfig, router_lr_mult: float) -> dict[ParamKey, Any] | None:
    """Settings of single parameters: with a learning-rate factor for routers, parameter groups with that
    ``lr_mult``.
    """
    if router_lr_mult == 1.0:
        return None
    own = {ParamKey(name="*.mlp.router.*"): {"lr_mult": router_lr_mult}}
    return {**get_standard_config_overrides(settings), **own}
