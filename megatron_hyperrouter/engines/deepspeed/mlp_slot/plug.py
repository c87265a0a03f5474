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
    """Replace the gate of ``moe`` by the router ``name``; returns the router.

    ``moe`` is a ``deepspeed.moe.layer.MoE`` with experts of any kind.  Call this before
    ``deepspeed.initialize``, which gives the router's parameters to the optimizer.  It may be before or
    after ``set_deepspeed_parallelism``. Without an optimizer, you can call it at any time.

    - ``layer_number`` (from 1): give each layer of a model a different number.  Routers with the same seed
      and number start with the same weights.
    - ``topk``: k, or a function from completed optimizer steps to k; by default the old gate's k.  If k or
      the router depends on the step, make a :class:`RouterSteps` for the model, or set
      ``moe.deepspeed_moe.gate.clock.step`` before each step.  It is the number of completed steps, and
      stays 0 if you do not set it.
    - ``aux_loss_coeff``, ``z_loss_coeff``: the second value that ``moe`` returns is the sum of the
      router's losses, each multiplied by its coefficient.  By default it is the Switch loss, which is 1
      when the load is even, as for the old gate at k = 1.  If your model multiplies it by a coefficient,
      that still works.
    - ``facts``: layers, steps and vocabulary of the model's run, for routers that depend on them
      (``competesmoe``, ``stablemoe``).
    - ``options``: fields of the router's ``Config``.  A few options need the ids or positions of tokens,
      or the choices of all ranks in a step (``simsmoe``, ``stablemoe``; ``topk`` with ``expert_bias``,
      ``jitter_eps`` or another ``aux_loss``).  A :class:`RouterSteps` provides these; without it, a
      warning says so.
    - ``competesmoe`` needs the same number of tokens on each rank of the expert-parallel group.

    Hidden size, experts, process group, device, dtype, ``drop_tokens``, both capacity factors and
    ``min_capacity`` are those of the old gate.  Over capacity, an expert keeps the tokens with the largest
    weights.  The old gate's noise, random token selection and sampling of second experts are removed.  The
    router computes its weights in each forward pass, so they are never stale.

    Raises TypeError and ValueError for a layer whose gate cannot be replaced, and ConfigError for an
    unknown router or wrong options.
    """
    old = _gate_of(moe)
    if layer_number < 1:
        raise ValueError(f"layer_number = {layer_number}: must be at least 1")
    for taken in ("hidden_size", "num_experts"):
        if taken in options:
            raise TypeError(f"{taken} is set by the layer and cannot be given")
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
    moe.deepspeed_moe.gate = gate
    consult_experts(moe.deepspeed_moe)
    return router


def _gate_of(moe: nn.Module) -> TopKGate:
    if not isinstance(moe, MoE):
        hint = (
            "; call it once for each layer"
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
