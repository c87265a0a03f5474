"""Our routers in your own DeepSpeed model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch import nn

from megatron_hyperrouter.engines.deepspeed.mlp_slot.gate import RouterGate
from megatron_hyperrouter.engines.deepspeed.mlp_slot.routed import consult_experts
from megatron_hyperrouter.routers import build_router
from megatron_hyperrouter.routers.base import Router, RunFacts


def plug_into_deepspeed(
    moe: MoE,
    name: str,
    *,
    seed: int = 1234,
    layer_number: int = 1,
    topk: int | Callable[[int], int] | None = None,
    aux_loss_coeff: float = 1.0,
    z_loss_coeff: float = 0.0,
    facts: RunFacts | None = None,
    **options: Any,
) -> Router:
    """Replace the gate of a DeepSpeed MoE layer with a router, and return the router.

    Call this function before ``deepspeed.initialize``, because ``deepspeed.initialize`` passes the router's
    parameters to the optimizer.  You can call it before or after ``set_deepspeed_parallelism``.  Without an
    optimizer, you can call it at any time.

    If k or the router depends on the step, create a ``RouterSteps`` for the model.  Alternatively, set
    ``moe.deepspeed_moe.gate.clock.step`` to the number of completed steps before each step.  A warning tells
    you if the router needs more than the step, and therefore a ``RouterSteps``.

    From the old gate, the router takes the hidden size, the experts, the process group, device and dtype,
    ``drop_tokens``, both capacity factors and ``min_capacity``.  If an expert gets more tokens than its
    capacity, it keeps the tokens with the largest weights.  The old gate's noise, random token selection
    and sampling of second experts are removed.  ``competesmoe`` needs the same number of tokens on each
    rank of the expert-parallel group.

    Args:
        moe: the layer, with experts of any kind.
        name: name of the router, such as ``"hyper"``; ``ROUTERS`` has all names.
        seed: random seed.
        layer_number: number of the layer, counted from 1.  Give each layer of a model a different number:
            routers with the same seed and number start with the same weights.
        topk: k, or a function that returns k for a number of completed optimizer steps; by default the k of
            the old gate.
        aux_loss_coeff: coefficient of the load-balancing loss.  The second value that ``moe`` returns is the
            sum of the router's losses, each multiplied by its coefficient.  By default, this is the loss of
            Switch Transformers.  It is 1 if the load is even, like the old gate's loss at k = 1, so a model
            that multiplies it by a coefficient still works.
        z_loss_coeff: coefficient of the z loss, which keeps logits small.
        facts: number of layers, steps and token ids, needed by ``competesmoe`` and ``stablemoe``.
        **options: the options of the router, as for ``build_router``.

    Raises:
        TypeError: ``moe`` is not a DeepSpeed MoE layer, its gate is not DeepSpeed's ``TopKGate``, or the
            options contain ``hidden_size`` or ``num_experts``, which ``moe`` determines.
        ValueError: ``layer_number`` is less than 1, or the gate cannot be replaced, for example because
            ``deepspeed.initialize`` came first.
        ConfigError: the router or an option is unknown, or a value is out of range.
    """
    old = _gate_of(moe)
    if layer_number < 1:
        raise ValueError(f"layer_number = {layer_number}: must be at least 1")
    for taken in ("hidden_size", "num_experts"):
        if taken in options:
            raise TypeError(f"{taken} must not be given, because the MoE layer determines it")
    weight = old.wg.weight
    hidden_size, num_experts = weight.size(1), weight.size(0)
    router = build_router(
        name,
        hidden_size=hidden_size,
        num_experts=num_experts,
        topk=old.k if topk is None else topk,
        layer_number=layer_number,
        seed=seed,
        aux_loss_coeff=aux_loss_coeff,
        z_loss_coeff=z_loss_coeff,
        facts=facts,
        **options,
    ).to(weight.device, weight.dtype)
    _refuse_too_late(old, router)
    for lost in router.config.unserved():
        warnings.warn(lost, stacklevel=2)
    moe.deepspeed_moe.gate = _replacement(old, router)
    consult_experts(moe.deepspeed_moe)
    return router


def _gate_of(moe: nn.Module) -> TopKGate:
    if not isinstance(moe, MoE):
        hint = (
            "; call plug_into_deepspeed once for each MoE layer of the model"
            if isinstance(moe, nn.Module) and any(isinstance(part, MoE) for part in moe.modules())
            else ""
        )
        raise TypeError(f"moe must be a deepspeed.moe.layer.MoE, not {type(moe).__qualname__}{hint}")
    gate = moe.deepspeed_moe.gate
    if isinstance(gate, RouterGate):
        raise ValueError(
            f"this MoE layer already has the router {gate.router.name}; create a new layer for another router"
        )
    if not isinstance(gate, TopKGate):
        raise TypeError(
            f"the gate of this MoE layer is a {type(gate).__qualname__}; only "
            "the TopKGate of DeepSpeed can be replaced"
        )
    if moe.deepspeed_moe.use_tutel:
        raise ValueError("this MoE layer uses Tutel, which is not supported; build it with use_tutel=False")
    return gate


def _replacement(old: TopKGate, router: Router) -> RouterGate:
    """A gate with this router, and with the capacity, mode and process group of the old gate."""
    gate = RouterGate(
        router,
        capacity_factor=old.capacity_factor if old.drop_tokens else None,
        eval_capacity_factor=old.eval_capacity_factor if old.drop_tokens else None,
        min_capacity=old.min_capacity,
        capacity_multiple=_tensor_ranks,
    )
    gate.train(old.training)
    if old.ep_group is not None:  # set_deepspeed_parallelism() was there already
        gate._set_ep_group(old.ep_group)
    return gate


def _refuse_too_late(old: TopKGate, router: Router) -> None:
    """ValueError if ZeRO has already partitioned its parameters: it would silently never train a parameter
    that is added later.
    """
    in_zero = getattr(old.wg.weight, "_hp_mapping", None) is not None or hasattr(old.wg.weight, "ds_id")
    if in_zero and any(parameter.requires_grad for parameter in router.parameters()):
        raise ValueError(
            "deepspeed.initialize has already passed this layer's parameters to ZeRO, so a new router "
            "would never be trained; call plug_into_deepspeed before deepspeed.initialize"
        )


def _tensor_ranks() -> int:
    """Number of TP ranks over which MOELayer splits the slots; DeepSpeed knows it after initialisation
    (sharded_moe.py:686).
    """
    ranks: int = bwc_tensor_model_parallel_world_size(groups.mpu)
    return ranks
