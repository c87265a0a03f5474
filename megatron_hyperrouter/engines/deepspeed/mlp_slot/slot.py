"""DeepSpeed-MoE in the MLP slot of megatron-core's transformer layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_hyperrouter.config.derived import expert_tensor_size, recomputed_parts, stacks_experts
from megatron_hyperrouter.config.tree import RunConfig
from megatron_hyperrouter.engines.clock import Clock, spread_out
from megatron_hyperrouter.engines.deepspeed.mlp_slot.gate import RouterGate
from megatron_hyperrouter.engines.deepspeed.mlp_slot.routed import consult_experts, stack_experts
from megatron_hyperrouter.engines.routing import make_router
from megatron_hyperrouter.engines.statistics import RouterStatistics
from megatron_hyperrouter.routers.base import Router


class MoESlot(MegatronModule):
    """DeepSpeed's MoE layer with megatron-core's SwiGLU experts and one of our routers.

    The routers' losses join the graph where they arise (``MoEAuxLossAutoScaler``), so no pipeline stage has
    to carry them.

    ``--mlp-type residual`` is the Residual-MoE of PR-MoE (DeepSpeed-MoE, 2201.05596, section 4.1), as
    DeepSpeed computes it (moe/layer.py:124): ``c_0 MoE(x) + c_1 MLP(x)`` with ``c = softmax(W x + b)``, and
    an MLP as wide as one expert.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        run: RunConfig,
        make: Callable[[int], Router],
        clock: Clock,
        statistics: RouterStatistics,
        shared_expert: ModuleSpec,
        **_: object,
    ) -> None:
        """``make``: the router of the layer of this number, counted from 1 over the whole model;
        ``shared_expert``: built where the settings ask for one.  Newer hosts give more arguments.
        """
        super().__init__(config)
        model, parallel = run.model, run.parallel
        shared_experts, residual = expert_tensor_size(run) > 1, model.mlp_type == "residual"
        stacked = stacks_experts(run)
        self.moe = MoE(
            model.hidden_size,
            nn.Identity() if stacked else Expert(config, shared=shared_experts),
            num_experts=model.num_experts,
            ep_size=parallel.expert_model_parallel_size,
            k=1,  # DeepSpeed's own gate, which is replaced below
            use_rts=False,
            enable_expert_tensor_parallelism=shared_experts,
            use_residual=residual,
        )
        # DeepSpeed takes the first expert; ours is cut over all TP ranks, and is no expert to the
        # data-parallel sums
        if residual:
            self.moe.mlp = Expert(config, shared=True)
        self.shared_experts = None
        if config.moe_shared_expert_intermediate_size is not None:
            self.shared_experts = build_module(
                shared_expert,
                config=config,
                gate=config.moe_shared_expert_gate,
                pg_collection=ProcessGroupCollection.use_mpu_process_groups(["tp"]),
            )
        if stacked:
            stack_experts(self.moe.deepspeed_moe, run)
        for parameter in self.moe.deepspeed_moe.experts.parameters():
            # As DeepSpeed marks its own experts (moe/experts.py).
            parameter.allreduce, parameter.group_name = False, self.moe.expert_group_name
            # Else DeepSpeed's gradient norm leaves out the experts of all TP ranks but the first.
            parameter.model_parallel = parallel.tensor_model_parallel_size > 1
        # The layer number is known when the transformer layer calls set_layer_number().
        self._run, self._make, self._clock, self._statistics = run, make, clock, statistics
        self._recomputed = recomputed_parts(run)

    def set_layer_number(self, layer_number: int) -> None:
        """Called by the transformer layer; builds the router of this layer (numbers count from 1 over the
        whole model).
        """
        self.moe.deepspeed_moe.gate = RouterGate(
            self._make(layer_number),
            clock=self._clock,
            statistics=self._statistics,
            capacity_factor=self._run.model.moe_expert_capacity_factor,
            capacity_multiple=self._run.parallel.tensor_model_parallel_size,
        )
        consult_experts(self.moe.deepspeed_moe)

    def forward(self, hidden_SBD: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """Returns (output ``[S, B, D]``, no bias)."""
        return self._perhaps_again("moe", self._whole, hidden_SBD), None

    def _whole(self, hidden_SBD: Tensor) -> Tensor:
        output_SBD = self._routed(hidden_SBD)
        if self.shared_experts is None:
            return output_SBD
        if "moe" in self._recomputed:  # which is around this
            return output_SBD + self.shared_experts(hidden_SBD)
        return output_SBD + self._perhaps_again("shared_experts", self.shared_experts, hidden_SBD)

    def _perhaps_again(self, part: str, call: Callable[[Tensor], Tensor], hidden_SBD: Tensor) -> Tensor:
        """The part's output; the backward pass computes it again where --recompute-modules names it."""
        if part in self._recomputed and self.training and torch.is_grad_enabled():
            output_SBD: Tensor = checkpoint(call, hidden_SBD, use_reentrant=False)
            return output_SBD
        return call(hidden_SBD)

    def _routed(self, hidden_SBD: Tensor) -> Tensor:
        # every TP rank routes the whole sequence, so the backward pass needs no sum over ranks
        if self.config.sequence_parallel:
            hidden_SBD = gather_from_sequence_parallel_region(hidden_SBD, tensor_parallel_output_grad=False)
        output_SBD, loss, _ = self._of_real_tokens(hidden_SBD)
        if self.training:
            output_SBD = MoEAuxLossAutoScaler.apply(output_SBD, loss)
        if self.config.sequence_parallel:
            output_SBD = scatter_to_sequence_parallel_region(output_SBD)
        return output_SBD

    def _of_real_tokens(self, hidden_SBD: Tensor) -> tuple[Tensor, Tensor, Any]:
        """What DeepSpeed's layer gives; padding goes to no expert."""
        rows_R = self.moe.deepspeed_moe.gate.site.real_rows()
        if rows_R is None:
            given: tuple[Tensor, Tensor, Any] = self.moe(hidden_SBD)
            return given
        real_R1D = hidden_SBD.flatten(0, 1).index_select(0, rows_R).unsqueeze(1)
        output_R1D, loss, counts = self.moe(real_R1D)
        return spread_out(output_R1D.squeeze(1), rows_R, hidden_SBD), loss, counts


class Expert(MLP):
    """megatron-core's SwiGLU MLP as DeepSpeed calls it: an expert, or the dense MLP in addition to the
    experts.
    """

    def __init__(self, config: TransformerConfig, *, shared: bool) -> None:
        """``shared``: the TP ranks share it; DeepSpeed then leaves the sum over them to the expert."""
        own = copy.copy(config)
        own.sequence_parallel = False  # DeepSpeed gathers the tokens before it dispatches them
        own.ffn_hidden_size = config.moe_ffn_hidden_size  # mlp.py sizes linear_fc2 by it
        super().__init__(
            own,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            is_expert=not shared,
            ffn_hidden_size=config.moe_ffn_hidden_size,
            tp_group=parallel_state.get_tensor_model_parallel_group()
            if shared
            else parallel_state.get_expert_tensor_parallel_group(),
        )
        self._given = (config, shared)

    def __deepcopy__(self, memo: dict[int, object]) -> Expert:
        """DeepSpeed copies one expert E times; megatron-core's layers have a process group, which cannot be
        copied: build another.
        """
        config, shared = self._given
        return Expert(config, shared=shared)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: [groups, 1, slots, D] for an expert, [S, B, D] for the dense MLP.

        megatron-core's weight gradient needs two dimensions (tensor_parallel/layers.py:614).
        """
        output, _ = super().forward(x.reshape(-1, x.shape[-1]))
        return output.view(x.shape)


def moe_spec(
    run: RunConfig,
    *,
    vocab_size: int,
    clock: Clock,
    statistics: RouterStatistics,
    shared_expert: ModuleSpec,
) -> ModuleSpec:
    """Spec of the MLP slot; ``vocab_size``: ids of the tokenizer."""
    params = {
        "run": run,
        "make": partial(make_router, run, vocab_size=vocab_size),
        "clock": clock,
        "statistics": statistics,
        "shared_expert": shared_expert,
    }
    return ModuleSpec(module=MoESlot, params=params)
