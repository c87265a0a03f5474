"""The model of a run under DeepSpeed: layers in a row or in pipeline stages, with initial weights and global
names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from deepspeed.moe.utils import is_moe_param
from megatron.core import parallel_state
from torch import nn

from megatron_hyperrouter.config.derived import expert_tensor_size
from megatron_hyperrouter.engines.deepspeed.layers import Sequence, model_layers
from megatron_hyperrouter.engines.deepspeed.mlp_slot.slot import moe_spec
from megatron_hyperrouter.engines.deepspeed.names import global_name
from megatron_hyperrouter.model.names import router_parameter
from megatron_hyperrouter.model.spec import padded_vocab_size, shared_expert_spec, transformer_config
from megatron_hyperrouter.routers.base import Router

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.engines.clock import Clock
    from megatron_hyperrouter.engines.statistics import RouterStatistics
    from megatron_hyperrouter.model.classifier import Classifier
    from megatron_hyperrouter.model.loss import LanguageModelLoss

STAND_IN = "frozen_experts"


def build(
    run: RunConfig,
    *,
    vocab_size: int,
    clock: Clock,
    statistics: RouterStatistics,
    loss: LanguageModelLoss,
    classifier: Classifier | None = None,
) -> nn.Module:
    """``vocab_size``: ids of the tokenizer, before padding.  Weights are left as they come."""
    parallel = run.parallel
    core = transformer_config(
        run,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_size(run),
        # The stages are DeepSpeed's: megatron-core would add another offset to layer numbers
        # (transformer_layer.py:48).
        pipeline_model_parallel_size=1,
    )
    moe = moe_spec(
        run,
        vocab_size=vocab_size,
        clock=clock,
        statistics=statistics,
        shared_expert=shared_expert_spec(),
    )
    layers = model_layers(
        run, core, moe, padded_vocab_size(vocab_size, run), clock=clock, classifier=classifier
    )
    stages = parallel.pipeline_model_parallel_size
    if stages == 1:
        return frozen_parts(Sequence(layers, loss), run, classifier)
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    from megatron_hyperrouter.engines.deepspeed.stages import Stages

    topology = PipeModelDataParallelTopology(
        num_pp=stages,
        num_mp=parallel.tensor_model_parallel_size,
        num_dp=parallel_state.get_data_parallel_world_size(),
    )
    staged = Stages(run, layers, topology=topology, loss_fn=loss)
    return frozen_parts(staged, run, classifier)


def frozen_parts(model: nn.Module, run: RunConfig, classifier: Classifier | None) -> nn.Module:
    """Turn off the gradients of the parameters that ``classifier`` freezes, and return the model.

    ZeRO refuses a model whose experts are all frozen (stage_1_and_2.py:872), so one number that never gets
    a gradient replaces them.
    """
    for name, parameter in list(model.named_parameters()):
        if classifier is None or not classifier.freezes(_global(name, run)):
            continue
        parameter.requires_grad_(False)
        if is_moe_param(parameter) and not hasattr(model, STAND_IN):
            number: Any = nn.Parameter(parameter.new_zeros(1))
            number.allreduce, number.group_name = False, parameter.group_name  # type: ignore[attr-defined]
            model.register_parameter(STAND_IN, number)
    return model


def named_parameters(model: nn.Module, run: RunConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """(global name, parameter) of each parameter on this rank, except frozen parameters of routers, which
    are part of their state.  One name may stand for several matrices, which ``model.names.matrices``
    separates.
    """
    for name, parameter in model.named_parameters():
        if name == STAND_IN:
            continue
        known = _global(name, run)
        if parameter.requires_grad or router_parameter(known) is None:
            yield known, parameter


def routers(model: nn.Module, run: RunConfig) -> dict[str, Router]:
    """Prefix of the global names -> router."""
    return {
        _global(f"{name}.", run): module
        for name, module in model.named_modules()
        if isinstance(module, Router)
    }


def _global(name: str, run: RunConfig) -> str:
    experts = run.model.num_experts // run.parallel.expert_model_parallel_size
    first = parallel_state.get_expert_model_parallel_rank() * experts
    return global_name(name, num_layers=run.model.num_layers, first_expert=first, experts=experts)
