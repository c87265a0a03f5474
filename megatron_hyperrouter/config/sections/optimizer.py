"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from megatron_hyperrouter.config.kinds import Count, Natural, NonNegative
from megatron_hyperrouter.config.roles import Only, Quiet, Role


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: Annotated[NonNegative, Role.COURSE, "Peak learning rate"] = 3e-4
    min_lr: Annotated[NonNegative, Role.COURSE, "Learning rate at the end of the decay"] = 0.0
    lr_decay_style: Annotated[
        Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"],
        Role.SCHEDULE,
        Quiet("constant"),
        "Shape of the learning-rate decay. WSD (warmup-stable-decay): constant until the final decay",
    ] = "cosine"
    lr_decay_iters: Annotated[
        Count | None, Role.SCHEDULE, "Step at which the learning-rate decay ends; default: --train-iters"
    ] = None
    lr_warmup_iters: Annotated[Natural, Role.SCHEDULE, "Number of steps of linear learning-rate warm-up"] = 0
    lr_warmup_init: Annotated[NonNegative, Role.SCHEDULE, "Learning rate at the start of the warm-up"] = 0.0
    lr_wsd_decay_style: Annotated[
        Literal["exponential", "linear", "cosine", "minus_sqrt"],
        Role.SCHEDULE,
        "With --lr-decay-style WSD: shape of the final decay",
    ] = "exponential"
    lr_wsd_decay_iters: Annotated[
        Count | None,
        Role.SCHEDULE,
        "With --lr-decay-style WSD: number of steps of the final decay; default: a tenth of --lr-decay-iters",
    ] = None
    weight_decay: Annotated[
        NonNegative,
        Role.COURSE,
        "Decoupled weight decay; vectors (norms, router embeddings) do not decay",
    ] = 0.01
    clip_grad: Annotated[NonNegative, Role.COURSE, "Clip gradients to the global norm X; 0: no clipping"] = (
        1.0
    )
    adam_beta1: Annotated[float, Ge(0.0), Lt(1.0), Role.COURSE, "Decay rate of Adam's first moment"] = 0.9
    adam_beta2: Annotated[float, Ge(0.0), Lt(1.0), Role.COURSE, "Decay rate of Adam's second moment"] = 0.999
    adam_eps: Annotated[float, Gt(0.0), Role.COURSE, "Adam's epsilon"] = 1e-8
    use_distributed_optimizer: Annotated[
        bool,
        Role.SHARDING,
        Only("megatron", harmless="--zero-stage 1 does the same"),
        "Shard the optimizer state over the data-parallel ranks",
    ] = False
    grad_reduce_in_bf16: Annotated[
        bool,
        Role.PRECISION,
        Only("megatron"),
        "With --bf16: accumulate and reduce gradients in bfloat16 instead of float32, which "
        "saves memory but is less exact",
    ] = False
    overlap_grad_reduce: Annotated[
        bool | None,
        Role.SPEED,
        Only("megatron", harmless="DeepSpeed itself decides whether to overlap"),
        "Overlap the reduction of gradients with the backward pass; default: on where "
        "--use-distributed-optimizer allows it (see docs/speed.md)",
    ] = None
    overlap_param_gather: Annotated[
        bool | None,
        Role.SPEED,
        Only("megatron", harmless="DeepSpeed itself decides whether to overlap"),
        "Overlap the all-gather of weights with the forward pass; default: on if "
        "--overlap-grad-reduce and --use-distributed-optimizer are on",
    ] = None
    ddp_bucket_size: Annotated[
        Count | None,
        Role.SPEED,
        Only("megatron", harmless="DeepSpeed chooses bucket sizes by the model size"),
        "With overlapping communication: number of gradient elements to reduce together; default: "
        "10^6 per data-parallel rank, but at least 4 x 10^7",
    ] = None
