"""The model of a run under megatron-core: its chunks on this rank, with initial weights and global names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from megatron_hyperrouter.config.derived import expert_tensor_size, stacks_experts
from megatron_hyperrouter.engines.megatron.routed import RoutedMoELayer, StackedExperts
from megatron_hyperrouter.engines.megatron.router import MegatronRouter
from megatron_hyperrouter.engines.routing import make_router
from megatron_hyperrouter.model.names import (
    WORD_EMBEDDINGS,
    is_expert,
    plain_name,
    router_parameter,
    stacked_name,
)
from megatron_hyperrouter.model.output import ClassOutput, OutputLayer, Projection
from megatron_hyperrouter.model.spec import (
    expert_spec,
    last_norm,
    layer_specs,
    mtp_spec,
    padded_vocab_size,
    shared_expert_spec,
    transformer_config,
    turn_by_rates,
)
from megatron_hyperrouter.routers import ROUTERS, Router

if TYPE_CHECKING:
    from megatron_hyperrouter.config.tree import RunConfig
    from megatron_hyperrouter.engines.clock import Clock
    from megatron_hyperrouter.engines.statistics import RouterStatistics
    from megatron_hyperrouter.model.classifier import Classifier
    from megatron_hyperrouter.model.loss import LanguageModelLoss


def core_config(run: RunConfig) -> TransformerConfig:
    """megatron-core's configuration with this run's layout."""
    parallel, train = run.parallel, run.train
    interleaved = (parallel.virtual_pipeline_model_parallel_size or 1) > 1
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size
        if interleaved
        else None,
        "num_layers_in_first_pipeline_stage": parallel.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": parallel.decoder_last_pipeline_num_layers,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": expert_tensor_size(run),
        "sequence_parallel": parallel.sequence_parallel,
        "moe_token_dispatcher_type": run.engine.moe_token_dispatcher_type,
        # With the defaults, the interleaved schedule is silently wrong on gloo (gradient norm 2.19 for 1.04).
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }
    if run.model.moe_expert_capacity_factor is not None:
        fields |= {
            "moe_expert_capacity_factor": run.model.moe_expert_capacity_factor,
            "moe_token_drop_policy": "probs",
        }
    if train.recompute_granularity == "full":
        fields |= {
            "recompute_granularity": "full",
            "recompute_method": train.recompute_method or "uniform",
            "recompute_num_layers": train.recompute_num_layers or 1,
        }
    return transformer_config(run, **fields)


class LossGPT(GPTModel):
    """megatron-core's model, with the loss of the micro-batch (a scalar) as its output."""

    def __init__(self, *, loss: LanguageModelLoss, **given: Any) -> None:
        """``given``: the host's arguments."""
        super().__init__(**given)
        self._loss, self._ahead = loss, 0
        if self.post_process:
            self.output_layer.__class__ = OutputLayer

    def forward(self, *arguments: Any, **more: Any) -> Tensor:
        """Like the host's method, but asks for the losses of multi-token prediction first."""
        self._ahead = self.config.mtp_num_layers or 0
        result: Tensor = super().forward(*arguments, **more)
        return result

    def compute_language_model_loss(self, labels_BS: Tensor, output: Projection | Tensor) -> Tensor:
        """Replaces the host's loss of each token; a loss that multi-token prediction adds is a mean."""
        if self._ahead == 0:
            return self._loss(output, labels_BS)
        self._ahead -= 1
        return self._loss.ahead(output, labels_BS, (self.config.mtp_num_layers or 0) - self._ahead)


def build(
    run: RunConfig,
    core: TransformerConfig,
    *,
    vocab_size: int,
    clock: Clock,
    statistics: RouterStatistics,
    loss: LanguageModelLoss,
    classifier: Classifier | None = None,
) -> list[nn.Module]:
    """The chunks of this pipeline rank: several with the interleaved schedule. This function does not set
    the weights.
    """
    router = partial(
        MegatronRouter,
        make=partial(make_router, run, vocab_size=vocab_size),
        clock=clock,
        statistics=statistics,
    )
    parts = MoESubmodules(experts=experts_of(run), shared_experts=shared_expert_spec(), router=router)
    moe = ModuleSpec(module=RoutedMoELayer, submodules=parts)
    specs = layer_specs(run, moe, starts=clock.starts_site)
    mtp = None
    if run.model.mtp_num_layers is not None:
        mtp = MultiTokenPredictionBlockSubmodules([mtp_spec(specs[-1])] * run.model.mtp_num_layers)
    tied = not run.model.untie_embeddings_and_output_weights and classifier is None
    chunks: list[nn.Module] = []
    stages = core.virtual_pipeline_model_parallel_size
    for number in range(stages or 1):
        chunk = number if stages else None
        first = get_transformer_layer_offset(core, chunk)
        own = specs[first : first + get_num_layers_to_build(core, chunk)]
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk)
        block = TransformerBlockSubmodules(layer_specs=own, layer_norm=last_norm(run))
        model = LossGPT(
            loss=loss,
            config=core,
            transformer_layer_spec=block,
            vocab_size=padded_vocab_size(vocab_size, run),
            max_sequence_length=run.model.seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
            post_process=last,
            position_embedding_type="rope",
            rotary_base=run.model.rotary_base,
            share_embeddings_and_output_weights=tied,
            mtp_block_spec=mtp if last else None,
            vp_stage=chunk,
        )
        if last and classifier is not None:
            model.output_layer = ClassOutput(core, classifier)
        elif last and tied and mtp is not None and not model.pre_process:
            # The stage reads logits from its embedding, so sums must not count this unused matrix.
            model.output_layer.weight.shared = True
        if not core.multi_latent_attention:
            turn_by_rates(model.rotary_pos_emb, run)
        if stages:
            model.model_type = None  # read by the interleaved schedule
        chunks.append(model)
    mark_experts(chunks, run)
    if classifier is not None:
        for name, parameter in named_parameters(chunks, run):
            if classifier.freezes(name):
                parameter.requires_grad_(False)
    return chunks


def experts_of(run: RunConfig) -> ModuleSpec:
    """Spec of the experts of a rank; routers that consult them need to call each by itself."""
    if stacks_experts(run):
        return ModuleSpec(module=StackedExperts, params={"run": run})
    return expert_spec(run, apart=ROUTERS[run.router.name].needs_experts)


def mark_experts(chunks: list[nn.Module], run: RunConfig) -> None:
    """Tell megatron-core which parameters are experts' where it does not see it itself.

    It marks them only when EP > 1 (tensor_parallel/layers.py:886, 1209); with TP 2, EP 1 and expert-TP 1
    their gradients would not be summed over TP: silently wrong by 1e-1.
    """
    if expert_tensor_size(run) == run.parallel.tensor_model_parallel_size:
        return
    for name, parameter in named_parameters(chunks, run):
        if is_expert(name):
            parameter.allreduce = False  # type: ignore[attr-defined]


def named_parameters(chunks: list[nn.Module], run: RunConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """(global name, parameter) of each parameter on this rank, except frozen parameters of routers, which
    are part of their state.  One name may stand for several matrices, which ``model.names.matrices``
    separates.
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            known = _global(name, chunk, run)
            if parameter.requires_grad or router_parameter(known) is None:
                yield known, parameter


def set_topk(chunks: list[nn.Module], topk: int) -> None:
    """Tell the dispatchers of all layers how many experts a token has."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, RoutedMoELayer):
                module.set_topk(topk)


def routers(chunks: list[nn.Module], run: RunConfig) -> dict[str, Router]:
    """Prefix of the global names -> router."""
    return {
        _global(f"{name}.", chunk, run): module
        for chunk in chunks
        for name, module in chunk.named_modules()
        if isinstance(module, Router)
    }


def _global(name: str, chunk: Any, run: RunConfig) -> str:
    name = plain_name(name)
    name = re.sub(
        r"^decoder\.layers\.(\d+)\.",
        lambda m: f"decoder.layers.{chunk.decoder.layers[int(m[1])].layer_number - 1}.",
        name,
    )
    experts = run.model.num_experts // run.parallel.expert_model_parallel_size
    first = parallel_state.get_expert_model_parallel_rank() * experts
    name = re.sub(r"\.local_experts\.(\d+)\.", lambda m: f".local_experts.{first + int(m[1])}.", name)
    name = stacked_name(name, first=first, count=experts)
    if name == "output_layer.weight" and not run.model.untie_embeddings_and_output_weights:
        return WORD_EMBEDDINGS  # the last stage's copy of the tied matrix
    if name.startswith("output_layer.classifier."):
        return name.removeprefix("output_layer.")
    return name.replace(".mlp.router.router.", ".mlp.router.")
